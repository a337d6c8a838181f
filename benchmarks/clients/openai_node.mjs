// OpenAI's client for node: completions, chats, streaming, errors. `node openai_node.mjs URL MODEL`.
import OpenAI from "openai";
import { VERSION } from "openai/version";

const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url, apiKey: "none" });
const messages = [{ role: "user", content: "reverse: stressed" }];

console.log("openai for node", VERSION);
console.log("models:", (await client.models.list()).data.map((found) => found.id));
const completion = await client.completions.create({ model, prompt: ["add: 20+22\n", "sort: cab\n"], temperature: 0 });
console.log("completions:", completion.choices.map((choice) => choice.text));
const chat = await client.chat.completions.create({ model, messages, temperature: 0 });
console.log("chat:", chat.choices[0].message.content, chat.usage.total_tokens);
const stream = await client.chat.completions.create({
  model, messages, temperature: 0, stream: true, stream_options: { include_usage: true },
});
let text = "", usage;
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta.content ?? "";
  usage = chunk.usage ?? usage;
}
console.log("chat stream:", text, usage.completion_tokens);
const helper = client.chat.completions.stream({ model, messages, temperature: 0 });
console.log("stream helper:", (await helper.finalChatCompletion()).choices[0].message.content);
try {
  await client.chat.completions.create({ model, messages, temperature: -1 });
} catch (error) {
  console.log("error:", error.constructor.name, error.status, error.param, "|", error.message);
}
