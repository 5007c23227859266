// The questions of a dataset's rows, or of those that a run is evaluated on, and what the dataset answers.
import { call } from "./app.js";

export class Questions {
  constructor() {
    this.kept = new Map();
  }

  /**
   * Return the turns of a row up to its last answer, and that answer. A row has at least one turn.
   *
   * @param source A dataset, or a run: then `row` counts the rows that it is evaluated on, `of` says how many those
   *   are, and `place` which row of the dataset it is.
   */
  async get(source, row) {
    const key = `${source}/${row}`;
    if (!this.kept.has(key)) {
      const address = source.startsWith("job_") ? `/api/training/jobs/${source}/validation` : `/api/datasets/${source}/preview`;
      const { rows, total } = await call("GET", `${address}?offset=${row}&limit=1`);
      this.kept.set(key, { ...question(rows[0]), of: total, place: rows[0]?.row });
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
