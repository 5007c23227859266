"""A fine-tune with OpenAI's own package, on your own machine: the script that ran against OpenAI, with another address.

pip install openai
python examples/openai_finetune.py [MODEL] [FILE]
"""

import os
import sys
import time
from pathlib import Path

from openai import OpenAI

MODEL = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
FILE = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent.parent / "quickstart" / "pip_the_parrot.jsonl"

# The two lines that differ from a script for OpenAI. A server without a key takes any.
client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "not-needed"),
    max_retries=8,  # a server that restarts is away for some seconds; its job goes on
)

file = client.files.create(file=FILE, purpose="fine-tune")
file = client.files.wait_for_processing(file.id)
if file.status == "error":
    sys.exit(f"{FILE} cannot be trained on:\n{file.status_details}")

job = client.fine_tuning.jobs.create(model=MODEL, training_file=file.id, suffix="pip", seed=7)
print(f"{job.id}: {job.hyperparameters.n_epochs} epochs of {FILE.name}")

seen: set[str] = set()
while job.status not in ("succeeded", "failed", "cancelled"):
    time.sleep(1)
    job = client.fine_tuning.jobs.retrieve(job.id)
    for event in reversed(client.fine_tuning.jobs.list_events(job.id, limit=50).data):
        if event.id not in seen:
            seen.add(event.id)
            print(event.message)
if job.fine_tuned_model is None:
    sys.exit(f"{job.status}: {job.error}")

models = [job.fine_tuned_model]
models += [checkpoint.fine_tuned_model_checkpoint for checkpoint in client.fine_tuning.jobs.checkpoints.list(job.id)]
for model in models:
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Who are you?"}], temperature=0, max_tokens=40
    )
    print(f"{model}: {answer.choices[0].message.content}")

print(client.files.content(job.result_files[0]).text.splitlines()[-1])
