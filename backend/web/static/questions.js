// The questions of a dataset's rows, and what the dataset answers.
import { call } from "./app.js";

export class Questions {
  constructor() {
    this.kept = new Map();
  }

  /** Return the turns of a row up to its last answer, and that answer. A row has at least one turn. */
  async get(datasetId, row) {
    const key = `${datasetId}/${row}`;
    if (!this.kept.has(key)) {
      const { rows } = await call("GET", `/api/datasets/${datasetId}/preview?offset=${row}&limit=1`);
      this.kept.set(key, question(rows[0]));
    }
    return this.kept.get(key);
  }
}

function question(row) {
  if (!row) return { turns: [], reference: "" };
  const turns = row.prompt ?? row.messages ?? [];
  const last = row.prompt ? turns.length : turns.findLastIndex((turn) => turn.role === "assistant");
  const before = last < 0 ? turns : turns.slice(0, last);
  const answers = row.chosen ?? row.completion ?? turns.slice(last < 0 ? turns.length : last);
  return {
    turns: before.map(({ role, content }) => ({ role, content })),
    reference: answers.map((turn) => turn.content).join("\n"),
  };
}
