// Prompts and stops of a Modelfile, by Ollama's rules: go run ollama.go MODELFILE < [[{role, content}]] > {...}
//
// Ollama executes TEMPLATE as a Go template. Before, it merges neighbors of one role with an empty line between them; a
// template without .Messages gets each prompt as .Prompt. Quotes around a value are removed, nothing is unescaped.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}

func merged(messages []Message) []Message {
	var out []Message
	for _, message := range messages {
		if last := len(out) - 1; last >= 0 && out[last].Role == message.Role {
			out[last].Content += "\n\n" + message.Content
		} else {
			out = append(out, message)
		}
	}
	return out
}

func main() {
	file, err := os.ReadFile(os.Args[1])
	check(err)
	text := string(file)
	_, rest, found := strings.Cut(text, "TEMPLATE \"\"\"")
	source, _, closed := strings.Cut(rest, "\"\"\"")
	if !found || !closed {
		panic("no TEMPLATE")
	}
	stops := []string{}
	for _, line := range strings.Split(text, "\n") {
		if value := strings.TrimPrefix(line, "PARAMETER stop "); value != line {
			stops = append(stops, strings.TrimSuffix(strings.TrimPrefix(value, "\""), "\""))
		}
	}
	var conversations [][]Message
	check(json.NewDecoder(os.Stdin).Decode(&conversations))
	parsed, err := template.New("").Option("missingkey=zero").Parse(source)
	check(err)
	prompts := []string{}
	for _, messages := range conversations {
		values := map[string]any{"Messages": merged(messages), "Response": ""}
		if !strings.Contains(source, ".Messages") {
			values = map[string]any{"Prompt": messages[len(messages)-1].Content}
		}
		var prompt strings.Builder
		check(parsed.Execute(&prompt, values))
		prompts = append(prompts, prompt.String())
	}
	check(json.NewEncoder(os.Stdout).Encode(map[string]any{"prompts": prompts, "stops": stops}))
}
