"""The plain recipe: `datasets` loads the file, maps the chat template and the tokenizer over it, saves it."""

from __future__ import annotations

import json
import sys
from typing import Any

from datasets import load_dataset
from transformers import AutoTokenizer


def main(rows: str, checkpoint: str, processes: int, out: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        question = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        return dict(tokenizer(text, add_special_tokens=False))

    dataset = load_dataset("json", data_files=rows, split="train", cache_dir=f"{out}/cache")
    encoded = dataset.map(encode, num_proc=processes, remove_columns=dataset.column_names)
    encoded.save_to_disk(f"{out}/encoded")
    print(json.dumps({"rows_in": len(encoded), "rows": len(encoded)}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
