"""DVC stage `compare`: sample responses from the SFT model, rank them, merge in imported preferences."""

from collections import Counter
from pathlib import Path

import torch

from chatloom.config import CompareParams
from chatloom.data.comparisons import Comparison, imported, in_holdout, ranked_by_reference, write_comparisons
from chatloom.data.prepared import PreparedRow, read_split
from chatloom.device import resolve_device
from chatloom.errors import InputError
from chatloom.models.checkpoint import ChatModel, load_on
from chatloom.models.generation import generate
from chatloom.models.sampling import Sampling
from chatloom.progress import progress
from stages.run import StageRun, stage

SFT, ROWS = Path("models/sft"), Path("data/prepared/reward")


def main() -> None:
    with stage("compare") as run:
        params, runtime = run.params.compare, run.params.runtime
        rows = read_split(ROWS)
        run.dataset(ROWS, "reward")
        device = resolve_device(runtime.device, runtime.dtype, runtime.num_threads)
        found = [
            imported(row, in_holdout(row.id, params.holdout, params.seed)) for row in rows if len(row.responses) > 1
        ]
        sampled = (
            sample_and_rank(rows[: params.num_prompts], load_on(SFT, device), params) if params.num_prompts else []
        )
        comparisons = [*found, *sampled]
        if not any(not comparison.holdout for comparison in comparisons):
            raise InputError(
                f"no comparison to train on: {ROWS} has {len(rows)} rows and "
                f"compare.num_prompts = {params.num_prompts}; add preference data, or raise compare.num_prompts"
            )
        with run.out("data/comparisons") as folder:
            write_comparisons(folder, comparisons)
        show(run, sampled)
        held_out = [comparison for comparison in comparisons if comparison.holdout]
        run.metrics(
            {
                "prompts": len(comparisons),
                "pairs": sum(len(comparison.pairs) for comparison in comparisons),
                "holdout/prompts": len(held_out),
                "holdout/pairs": sum(len(comparison.pairs) for comparison in held_out),
                "imported": len(found),
                "sampled": len(sampled),
                "sampled_all_tied": min(params.num_prompts, len(rows)) - len(sampled),
                **{f"lang/{lang}": count for lang, count in sorted(Counter(c.lang for c in comparisons).items())},
            }
        )


def sample_and_rank(rows: list[PreparedRow], chat: ChatModel, params: CompareParams) -> list[Comparison]:
    """K responses a prompt from the SFT model, ranked by their likeness to the row's best answer."""
    prompts = [row.prompt_ids for row in rows for _ in range(params.num_responses)]
    with progress("compare", len(prompts)) as advance:
        ids = generate(
            chat.model,
            prompts,
            Sampling(params.max_new_tokens, params.temperature),
            stop_ids=chat.stop_ids,
            generator=torch.Generator().manual_seed(params.seed),
            batch_size=params.generation_batch,
            on_done=advance,
        )
    texts = [chat.tokenizer.decode(response, skip_special_tokens=True).strip() for response in ids]
    comparisons = []
    for number, row in enumerate(rows):
        own = slice(number * params.num_responses, (number + 1) * params.num_responses)
        comparison = ranked_by_reference(
            row,
            texts[own],
            ids[own],
            min_gap=params.min_similarity_gap,
            include_reference=params.include_reference,
            holdout=in_holdout(row.id, params.holdout, params.seed),
        )
        if comparison is not None:
            comparisons.append(comparison)
    return comparisons


def show(run: StageRun, comparisons: list[Comparison]) -> None:
    """A table of what was sampled and how it was ranked."""
    shown = [(c, i) for c in comparisons[:20] for i in range(len(c.responses))]
    run.table(
        "comparisons",
        {
            "prompt": [c.messages[-1]["content"] for c, _ in shown],
            "rank": [c.ranks[i] for c, i in shown],
            "origin": [c.origins[i] for c, i in shown],
            "response": [c.responses[i] for c, i in shown],
        },
    )


if __name__ == "__main__":
    main()
