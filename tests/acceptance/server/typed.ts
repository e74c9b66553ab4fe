// Every field of a request, as the types of the package openai want it; what is returned is used as those types say.
import OpenAI from "openai";

const [url, key, base, chat] = process.argv.slice(2) as [string, string, string, string];
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0 });

const completion: OpenAI.CompletionCreateParamsNonStreaming = {
  model: base, prompt: ["The bards of", "a village"], echo: true, frequency_penalty: 0.1, logit_bias: { "3": -1 },
  logprobs: 2, max_tokens: 5, n: 2, presence_penalty: 0.1, seed: 7, stop: ["#"], temperature: 1, top_p: 0.9, user: "u",
};
const whole: OpenAI.Completion = await client.completions.create(completion);
const first: OpenAI.CompletionChoice = whole.choices[0]!;
const scores: number = first.logprobs?.token_logprobs?.at(-1) ?? NaN;

let written = "";
let counted: OpenAI.CompletionUsage | null | undefined;
const stream = await client.completions.create({ ...completion, prompt: "The bards of", echo: false, n: 1, stream: true,
  stream_options: { include_usage: true } });
for await (const chunk of stream) {
  written += chunk.choices[0]?.text ?? "";
  counted = chunk.usage ?? counted;
}

const talk: OpenAI.Chat.ChatCompletionCreateParamsNonStreaming = {
  model: chat, messages: [{ role: "user", content: [{ type: "text", text: "How many birds on day 7?" }] }],
  frequency_penalty: 0, logit_bias: null, logprobs: true, top_logprobs: 3, max_completion_tokens: 6, n: 1,
  presence_penalty: 0, response_format: { type: "text" }, seed: 7, stop: null, store: false, metadata: { a: "b" },
  temperature: 0, top_p: 1, tools: [], user: "u",
};
const answer: OpenAI.ChatCompletion = await client.chat.completions.create(talk);
const message: OpenAI.ChatCompletionMessage = answer.choices[0]!.message;
const tops: number = answer.choices[0]!.logprobs?.content?.[0]?.top_logprobs.length ?? 0;
let said = "";
for await (const chunk of await client.chat.completions.create({ ...talk, stream: true })) {
  said += chunk.choices[0]?.delta.content ?? "";
}

const vectors: OpenAI.CreateEmbeddingResponse = await client.embeddings.create({
  model: base, input: ["a", "village"], encoding_format: "float",
});
const models: OpenAI.Model[] = [];
for await (const model of client.models.list()) {
  models.push(model);
}

async function raised(call: () => Promise<unknown>): Promise<string> {
  try {
    await call();
  } catch (error) {
    if (error instanceof OpenAI.BadRequestError) return `400 ${error.param}`;
    if (error instanceof OpenAI.NotFoundError) return `404 ${error.code}`;
    if (error instanceof OpenAI.AuthenticationError) return `401 ${error.code}`;
  }
  return "nothing";
}

console.log(JSON.stringify({
  choices: whole.choices.length, echoed: first.text.startsWith("The bards of"), scored: scores <= 0,
  reason: first.finish_reason, written: written.length > 0, counted: counted?.completion_tokens, role: message.role,
  same: said === message.content, tops,
  vectors: vectors.data.map((each) => each.embedding.length), models: models.map((model) => model.id).sort(),
  errors: [
    await raised(() => client.completions.create({ ...completion, n: 0 })),
    await raised(() => client.completions.create({ ...completion, model: "none" })),
    await raised(() => new OpenAI({ baseURL: `${url}/v1`, apiKey: "wrong", maxRetries: 0 }).models.list()),
  ],
}));
