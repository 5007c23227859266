// Server-sent events that answer a POST, as an answer of a model does.
import { ask } from "./app.js";

/**
 * Post a body and hand over each event of the answer.
 *
 * @param onEvent Takes the kind of an event and its data, read from JSON.
 * @param signal Ends it: the server then stops answering.
 */
export async function postStream(address, body, onEvent, signal) {
  const answer = await ask("POST", address, body, { signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const events = text.split(/\r?\n\r?\n/);
    text = events.pop();
    for (const event of events) {
      let kind = "message";
      const data = [];
      for (const line of event.split(/\r?\n/)) {
        if (line.startsWith("event:")) kind = line.slice(6).trim();
        else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
      }
      if (data.length) onEvent(kind, JSON.parse(data.join("\n")));
    }
  }
}
