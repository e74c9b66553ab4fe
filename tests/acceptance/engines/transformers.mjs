// Tokenize, chat and write with transformers.js: node transformers.mjs NODE_MODULES FOLDER < {texts, prompts, ...} > {...}
// FOLDER is what `bardlet export RUN --to onnx` writes. `npm install @huggingface/transformers --ignore-scripts` is
// enough: the package onnxruntime-node brings its library for the CPU (its install script gets the one for CUDA).
import { readFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

import { answer } from "./transformers_answer.mjs";

const home = join(process.argv[2], "@huggingface/transformers");
const library = await import(pathToFileURL(join(home, "dist/transformers.node.mjs")));
library.env.allowRemoteModels = false;
const options = { device: "cpu", session_options: { intraOpNumThreads: 2 } };
const request = JSON.parse(readFileSync(0, "utf8"));
console.log(JSON.stringify(await answer(library, resolve(process.argv[3]), options, request)));
