"""DVC stage `compare`: sample responses from the SFT model, have them ranked, merge in imported preferences."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from chatloom.config import CompareParams
from chatloom.data.comparisons import (
    Comparison,
    distinct,
    for_gold,
    imported,
    in_holdout,
    ranked,
    ranked_by_reference,
    write_comparisons,
)
from chatloom.data.judge import Judge, OverBudget
from chatloom.data.prepared import PreparedRow, read_split
from chatloom.data.rankings import CANDIDATES, Candidate, Consensus, consensus, read_rankings, write_candidates
from chatloom.data.schemas import Conversation
from chatloom.data.sources import file_sha256
from chatloom.data.templates import encode_row
from chatloom.device import resolve_device
from chatloom.errors import InputError
from chatloom.models.checkpoint import ChatModel, load_on, load_tokenizer, stop_ids
from chatloom.models.rollouts import RolloutEngine, open_engine, require_available
from chatloom.models.sampling import Sampling
from chatloom.progress import progress
from stages.run import StageRun, stage

log = logging.getLogger(__name__)

SFT, ROWS, RANKINGS = Path("models/sft"), Path("data/prepared/reward"), Path("data/rankings")
# Outside the outs: what a judge was paid for is kept when the stage runs again.
JUDGE_CACHE = Path(".state/judge")
Answers = tuple[list[str], list[list[int]]]
"""Texts and tokens of the responses sampled for one prompt."""


def main() -> None:
    with stage("compare") as run:
        params, runtime = run.params.compare, run.params.runtime
        rows = read_split(ROWS)
        run.dataset(ROWS, "reward")
        device = resolve_device(runtime.device, runtime.dtype, runtime.num_threads)
        require_available(params.generation, device.device, "compare.generation")
        counts: Counter[str] = Counter()
        found = [imported(row, holdout_of(row, params)) for row in rows if len(row.responses) > 1]
        said = consensus(read_rankings(RANKINGS)) if "people" in params.ranked_by else []
        by_people = ranked_by_people(said, rows, params, counts)
        prompts = [row for row in rows[: params.num_prompts] if row.responses]
        sft = weights_sha256(SFT)
        answers = []
        if prompts:
            engine = open_engine(params.generation, params.generation_batch, SFT, device, lora=None)
            answers = sample(prompts, load_on(SFT, device), engine, params)
        unranked = [(row, own) for row, own in zip(prompts, answers, strict=True) if row.id not in by_people]
        sampled = rank(unranked, sft, params, counts)
        comparisons = apart([*found, *by_people.values(), *sampled], rows, params)
        if not any(not comparison.holdout for comparison in comparisons):
            raise InputError(
                f"no comparison to train on: {ROWS} has {len(rows)} rows and "
                f"compare.num_prompts = {params.num_prompts}; add preference data, or raise compare.num_prompts"
            )
        with run.out("data/comparisons") as folder:
            write_comparisons(folder, comparisons)
            write_candidates(folder / CANDIDATES, candidates_of(prompts, answers, sft))
        show(run, sampled)
        held_out = [comparison for comparison in comparisons if comparison.holdout]
        run.metrics(
            {
                "prompts": len(comparisons),
                "pairs": sum(len(comparison.pairs) for comparison in comparisons),
                "gold/prompts": sum(comparison.gold for comparison in comparisons),
                "holdout/prompts": len(held_out),
                "holdout/pairs": sum(len(comparison.pairs) for comparison in held_out),
                "imported": len(found),
                "by_people": len(by_people),
                "sampled": len(sampled),
                "sampled_all_tied": len(unranked) - len(sampled),
                **counts,
                **{f"lang/{lang}": count for lang, count in sorted(Counter(c.lang for c in comparisons).items())},
            }
        )


def holdout_of(row: PreparedRow, params: CompareParams) -> bool:
    return in_holdout(row.family, params.holdout, params.seed)


def apart(comparisons: Sequence[Comparison], rows: Sequence[PreparedRow], params: CompareParams) -> list[Comparison]:
    """The comparisons, those marked that train the gold reward model; prompts nearly alike are on one side."""
    family = {row.id: row.family for row in rows}
    return [replace(c, gold=not c.holdout and for_gold(family[c.id], params.gold, params.seed)) for c in comparisons]


def weights_sha256(model: Path) -> str:
    """Of the weights' files, by name: which model it is that answered."""
    digests = [f"{file.name} {file_sha256(file)}" for file in sorted(model.glob("*.safetensors"))]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def ranked_by_people(
    said: Sequence[Consensus], rows: Sequence[PreparedRow], params: CompareParams, counts: Counter[str]
) -> dict[str, Comparison]:
    """What people said, by the id of its prompt; only of prompts in the reward split, as no other may train."""
    if not said:
        return {}
    by_id = {row.id: row for row in rows}
    tokenizer, [stop, *_] = load_tokenizer(SFT), stop_ids(SFT)
    found = {}
    for item in said:
        row, ranking = by_id.get(item.ranking.id), item.ranking
        if row is None or row.messages != ranking.messages:
            counts["people/not_in_split"] += 1
            continue
        ids = encode_row(tokenizer, stop, Conversation(row.messages, ranking.responses)).response_ids
        comparison = ranked(
            row,
            ranking.responses,
            ids,
            item.ranks,
            include_reference=False,
            holdout=holdout_of(row, params),
            by=item.annotators,
            sft=ranking.sft,
            at=item.at,
        )
        if comparison is None:
            counts["people/all_tied"] += 1
        else:
            found[row.id] = comparison
    if counts["people/not_in_split"]:
        log.warning("compare: %d rankings are of prompts that are not in %s", counts["people/not_in_split"], ROWS)
    return found


def sample(rows: Sequence[PreparedRow], chat: ChatModel, engine: RolloutEngine, params: CompareParams) -> list[Answers]:
    """K responses a prompt from the SFT model, at `params.temperatures` in turn: texts and tokens of each row."""
    slots = [(number, turn) for number in range(len(rows)) for turn in range(params.num_responses)]
    generator = torch.Generator().manual_seed(params.seed)
    ids: dict[tuple[int, int], list[int]] = {}
    with progress("compare", len(slots)) as advance:
        for index, temperature in enumerate(params.temperatures):
            own = [slot for slot in slots if slot[1] % len(params.temperatures) == index]
            responses = engine(
                chat.model,
                [rows[number].prompt_ids for number, _ in own],
                Sampling(params.max_new_tokens, temperature),
                stop_ids=chat.stop_ids,
                generator=generator,
                on_done=advance,
            ).responses
            ids |= dict(zip(own, responses, strict=True))
    answers = []
    for number in range(len(rows)):
        tokens = [ids[number, turn] for turn in range(params.num_responses)]
        answers.append(([chat.tokenizer.decode(one, skip_special_tokens=True).strip() for one in tokens], tokens))
    return answers


def candidates_of(rows: Sequence[PreparedRow], answers: Sequence[Answers], sft: str) -> list[Candidate]:
    """What people may rank: each prompt with its distinct answers, where there are two or more."""
    texts = [distinct(row, *own)[0] for row, own in zip(rows, answers, strict=True)]
    pairs = zip(rows, texts, strict=True)
    return [Candidate(row.id, row.lang, row.messages, own, sft) for row, own in pairs if len(own) > 1]


def rank(
    sampled: Sequence[tuple[PreparedRow, Answers]], sft: str, params: CompareParams, counts: Counter[str]
) -> list[Comparison]:
    """Comparisons by the judge, as far as its budget lasts, or by likeness to the reference answer."""
    judge = Judge(params.judge, JUDGE_CACHE) if params.judge is not None else None
    comparisons = []
    for row, (texts, ids) in sampled:
        comparison = None
        for ranker in params.ranked_by:
            if ranker == "judge" and judge is not None:
                own, own_ids = distinct(row, texts, ids)
                try:
                    places = judge.rank(row.messages, own)
                except OverBudget:
                    counts["judge/over_budget"] += 1
                    continue
                comparison = ranked(
                    row,
                    own,
                    own_ids,
                    places,
                    include_reference=params.include_reference,
                    holdout=holdout_of(row, params),
                    by=[f"judge {judge.params.model}"],
                    sft=sft,
                )
                break
            if ranker == "reference":
                comparison = ranked_by_reference(
                    row,
                    texts,
                    ids,
                    min_gap=params.min_similarity_gap,
                    include_reference=params.include_reference,
                    holdout=holdout_of(row, params),
                    sft=sft,
                )
                break
        if comparison is not None:
            comparisons.append(comparison)
    if judge is not None:
        counts.update({"judge/requests": judge.asked, "judge/cached": judge.cached, "judge/unclear": judge.unclear})
        if counts["judge/over_budget"]:
            log.warning("compare: the judge's budget left out %d prompts", counts["judge/over_budget"])
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
            "ranked by": [", ".join(c.ranked_by) for c, _ in shown],
            "response": [c.responses[i] for c, i in shown],
        },
    )


if __name__ == "__main__":
    main()
