"""Exact resume: a run that was interrupted ends as one that was not, bit for bit (rule 22)."""

from __future__ import annotations

import json
import random
import shutil
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench import faults
from chatloom.config import Lora, Optimizer, Section, load_params
from chatloom.data.comparisons import Comparison
from chatloom.data.examples import Example
from chatloom.device import Device
from chatloom.models.adapters import Role, add_adapter
from chatloom.models.checkpoint import load_on, save_causal_lm
from chatloom.models.head import ScalarHead
from chatloom.models.reward_model import ADAPTER, save_reward_model
from chatloom.optim import MasterAdamW, ParameterGroup
from chatloom.ppo.loop import train_ppo
from chatloom.ppo.roles import load_roles
from chatloom.resume import Checkpoints, rng_state, set_rng_state, weights_hash
from chatloom.reward import train_reward
from chatloom.sft import train_sft
from stages.fingerprint import fingerprint, tree_hash
from tests.conftest import CPU, ROOT

KEY = {"params loop": "1", "code loop.py": "2", "data rows": "3"}
BFLOAT16 = Device(torch.device("cpu"), torch.bfloat16)


def checkpoints(folder: Path, key: Mapping[str, str] = KEY, every: int = 2, beside: Any = None) -> Checkpoints:
    return Checkpoints(folder / "loop", key, every, beside)


# --- states on disk ---


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    weight = torch.randn(3, 2, dtype=torch.bfloat16)
    state = {"loss": 0.1 + 0.2, "history": [{"a": 1.5}], "weight": weight, "none": None, "name": "ä"}
    checkpoints(tmp_path).save(4, state)
    saved = checkpoints(tmp_path).load()
    assert saved is not None
    step, found = saved
    assert step == 4
    assert torch.equal(found.pop("weight"), state.pop("weight"))
    assert found == state
    assert checkpoints(tmp_path / "elsewhere").load() is None


def test_the_newest_two_are_kept_and_the_newest_is_used(tmp_path: Path) -> None:
    own = checkpoints(tmp_path)
    for step in (2, 4, 6, 10):
        own.save(step, {})
    assert [path.name[:13] for path in sorted(own.folder.iterdir())] == ["step-00000006", "step-00000010"]
    assert checkpoints(tmp_path).load() == (10, {})
    own.remove()
    assert not own.folder.exists()


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty"])
def test_a_damaged_state_is_named_and_the_one_before_is_used(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = checkpoints(tmp_path)
    own.save(2, {"weight": torch.ones(100)})
    own.save(4, {"weight": torch.ones(100)})
    newest = max(own.folder.iterdir())
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes({"torn": content[:-7], "flipped": content, "empty": b""}[damage])
    found = checkpoints(tmp_path).load()
    assert found is not None
    assert found[0] == 2
    assert f"{newest} is torn or corrupt" in caplog.text
    for path in own.folder.iterdir():
        path.write_bytes(b"")
    assert checkpoints(tmp_path).load() is None


def test_a_state_that_was_being_written_is_none(tmp_path: Path) -> None:
    own = checkpoints(tmp_path)
    own.save(2, {})
    (own.folder / "unfinished.pt").write_bytes(b"half a sta")
    assert checkpoints(tmp_path).load() == (2, {})
    own.save(4, {})
    assert len(list(own.folder.iterdir())) == 2


@pytest.mark.parametrize("part", KEY)
def test_another_key_starts_afresh_and_says_why(part: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints(tmp_path).save(6, {})
    assert checkpoints(tmp_path, KEY | {part: "other"}).load() is None
    assert f"starts afresh, the state of step 6 is of another run; changed since: {part}" in caplog.messages[-1]
    assert not (tmp_path / "loop").exists()


def test_another_reference_starts_afresh(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own = checkpoints(tmp_path)
    own.load(reference="one")
    own.save(6, {})
    assert checkpoints(tmp_path).load(reference="one") == (6, {})
    assert checkpoints(tmp_path).load(reference="two") is None
    assert "changed since: reference" in caplog.text


def test_weights_hash_sees_every_weight_but_adapters(checkpoint: Path, lora: Lora) -> None:
    model = load_on(checkpoint, CPU).model
    before = weights_hash(model)
    assert weights_hash(load_on(checkpoint, CPU).model) == before
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] += 1e-3
    assert weights_hash(model) != before
    add_adapter(model, "policy", lora, seed=0)
    adapted = weights_hash(model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 1
    assert weights_hash(model) == adapted


def test_every_random_number_generator_goes_on_where_it_was() -> None:
    saved = rng_state()
    expected = torch.rand(2).tolist(), random.random(), np.random.rand()
    np.random.randn()  # leaves a second normal number behind, which is state too
    set_rng_state(saved)
    assert (torch.rand(2).tolist(), random.random(), np.random.rand()) == expected


def test_what_stands_beside_the_loop_is_saved_and_restored_with_it(tmp_path: Path) -> None:
    recorder = Recorder()
    recorder(1, {"train/loss": 2.0})
    checkpoints(tmp_path, beside=recorder).save(1, {})
    other = Recorder()
    checkpoints(tmp_path, beside=other).load()
    assert other.logged == [(1, {"train/loss": 2.0})]


# --- the key ---


@pytest.fixture
def stage_folder(tmp_path: Path) -> Path:
    """A folder with a stage that depends on a file and a folder of code and on a folder of data."""
    stage = {"deps": ["chatloom/sft.py", "chatloom/ppo", "data/prepared/sft"], "params": ["train_sft", "runtime.dtype"]}
    (tmp_path / "dvc.yaml").write_text(json.dumps({"stages": {"train_sft": stage}}))
    shutil.copy(ROOT / "params.yaml", tmp_path)
    for name in ("chatloom/sft.py", "chatloom/ppo/kl.py", "data/prepared/sft/part-0.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "old", "new", "changed"),
    [
        ("params.yaml", "lr: 5.0e-5", "lr: 6.0e-5", {"params train_sft"}),
        ("params.yaml", "dtype: auto", "dtype: float32", {"params runtime.dtype"}),
        ("params.yaml", "device: auto", "device: cpu", set()),
        ("chatloom/sft.py", "sft", "SFT", {"code chatloom/sft.py"}),
        ("chatloom/ppo/kl.py", "kl", "KL", {"code chatloom/ppo"}),
        ("data/prepared/sft/part-0.parquet", "part", "PART", {"data data/prepared/sft"}),
    ],
)
def test_the_key_is_what_dvc_lists(
    file: str, old: str, new: str, changed: set[str], stage_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(stage_folder)
    before = fingerprint("train_sft", load_params())
    assert before is not None
    assert len(before) == 5
    text = Path(file).read_text()
    assert old in text
    Path(file).write_text(text.replace(old, new))
    after = fingerprint("train_sft", load_params())
    assert after is not None
    assert {name for name in before if before[name] != after[name]} == changed


def test_the_key_sees_names_and_new_files_and_no_bytecode(stage_folder: Path) -> None:
    folder = stage_folder / "chatloom/ppo"
    hashes = [tree_hash(folder)]
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__/kl.pyc").write_text("x")
    assert tree_hash(folder) == hashes[0]
    (folder / "kl.py").rename(folder / "kl2.py")
    hashes.append(tree_hash(folder))
    (folder / "new.py").write_text("")
    hashes += [tree_hash(folder), tree_hash(folder / "gone")]
    assert len(set(hashes)) == 4


def test_without_a_pipeline_nothing_is_known(tmp_path: Path) -> None:
    params = load_params(ROOT / "params.yaml")
    assert fingerprint("train_sft", params, tmp_path / "dvc.yaml") is None
    (tmp_path / "dvc.yaml").write_text("stages: {other: {}}")
    assert fingerprint("train_sft", params, tmp_path / "dvc.yaml") is None
    for stage in ("train_sft", "train_reward", "train_ppo"):
        assert fingerprint(stage, params, ROOT / "dvc.yaml")


# --- stopping ---


def run_ten(own: Checkpoints, signals: Mapping[int, list[signal.Signals]]) -> list[int]:
    """Steps finished by a loop of ten that gets `signals` in the middle of a step; it ends as the signals have it."""
    finished: list[int] = []
    try:
        with own:
            for step in range(1, 11):
                for number in signals.get(step, []):
                    signal.raise_signal(number)
                finished.append(step)
                if own.due(step):
                    own.save(step, {})
    except (KeyboardInterrupt, InterruptedError):
        finished.append(-1)
    return finished


@pytest.fixture
def sigterm_raises() -> Any:
    def terminate(_number: int, _frame: FrameType | None) -> None:
        raise InterruptedError

    before = signal.signal(signal.SIGTERM, terminate)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_waits_for_the_step_and_its_state(
    number: signal.Signals, tmp_path: Path, sigterm_raises: None
) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    own = checkpoints(tmp_path, every=100)
    assert run_ten(own, {3: [number]}) == [1, 2, 3, -1]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert checkpoints(tmp_path).load() == (3, {})


def test_the_second_signal_acts_at_once(tmp_path: Path, sigterm_raises: None) -> None:
    assert run_ten(checkpoints(tmp_path, every=2), {3: [signal.SIGINT, signal.SIGTERM]}) == [1, 2, -1]
    assert checkpoints(tmp_path).load() == (2, {})


def test_a_signal_after_the_last_step_is_not_lost(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), checkpoints(tmp_path):
        signal.raise_signal(signal.SIGINT)


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run_ten(checkpoints(tmp_path), {3: [signal.SIGINT]}) == list(range(1, 11))
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_loop_in_another_thread_saves_its_states(tmp_path: Path) -> None:
    finished: list[int] = []
    thread = threading.Thread(target=lambda: finished.extend(run_ten(checkpoints(tmp_path), {})))
    thread.start()
    thread.join()
    assert finished == list(range(1, 11))
    assert checkpoints(tmp_path).load() == (10, {})


# --- the optimizer ---


def test_the_optimizer_goes_on_as_if_it_had_never_stopped(optimizer: Optimizer) -> None:
    """Of bfloat16 parameters: what is below their precision lives in the masters alone."""

    def start() -> tuple[nn.Parameter, MasterAdamW]:
        parameter = nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.bfloat16))
        params = optimizer.model_copy(update={"lr": 1e-4, "weight_decay": 0.1})
        return parameter, MasterAdamW([ParameterGroup([parameter], 1e-4)], params)

    def step(parameter: nn.Parameter, adamw: MasterAdamW, number: int) -> None:
        (parameter.float() * torch.arange(12).roll(number)).sum().backward()
        adamw.step(1.0 / number, "train_sft", number)

    parameter, adamw = start()
    for number in (1, 2, 3):
        step(parameter, adamw, number)
    state = adamw.state_dict()
    assert state["masters"][0].data_ptr() == adamw._pairs[0][1].data_ptr(), "no copy"
    other, resumed = start()
    resumed.load_state_dict(state)
    assert torch.equal(other, parameter)
    for number in (4, 5):
        step(parameter, adamw, number)
    assert not torch.equal(resumed.state_dict()["masters"][0], adamw.state_dict()["masters"][0]), "no memory is shared"
    for number in (4, 5):
        step(other, resumed, number)
    for a, b in zip(tensors_in(resumed.state_dict()), tensors_in(adamw.state_dict()), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(other, parameter)


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        return [tensor for inner in value.values() for tensor in tensors_in(inner)]
    if isinstance(value, list):
        return [tensor for inner in value for tensor in tensors_in(inner)]
    return [value] if isinstance(value, Tensor) else []


# --- the loops, in fresh objects each time ---


class Killed(Exception):
    pass


class Recorder:
    """What a loop logged, as the stage keeps it: saved with the loop's state. Ends the run at step `kill_at`."""

    def __init__(self, kill_at: int | None = None) -> None:
        self.kill_at = kill_at
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.restored: int | None = None

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        self.logged.append((step, without_time(values)))
        if step == self.kill_at:
            raise Killed

    def state_dict(self) -> dict[str, Any]:
        return {"logged": self.logged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.logged = state["logged"]
        self.restored = self.logged[-1][0]


def without_time(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if not name.startswith("time/")}


Train = Callable[[Recorder, Checkpoints | None], tuple[dict[str, float], list[Tensor]]]


def assert_resumes_exactly(train: Train, folder: Path, kills: Mapping[int, int | None]) -> None:
    """Kill `train` at the steps `kills`, one after the other, each resumed after the step that is its value."""
    whole = Recorder()
    metrics, weights = train(whole, None)
    for seed, (kill_at, resumed_after) in enumerate(kills.items()):
        torch.manual_seed(seed)  # another process: its generators are anywhere
        recorder = Recorder(kill_at)
        with pytest.raises(Killed):
            train(recorder, checkpoints(folder, beside=recorder))
        assert recorder.restored == resumed_after
    recorder = Recorder()
    again, resumed = train(recorder, checkpoints(folder, beside=recorder))
    assert recorder.restored is not None
    assert recorder.restored >= max(kills) - 2, "it went on from the last state"
    assert recorder.logged == whole.logged
    assert without_time(again) == without_time(metrics)
    assert len(weights) == len(resumed) > 0
    for a, b in zip(weights, resumed, strict=True):
        assert torch.equal(a, b)


def section(name: str, **changes: Any) -> Any:
    """A section of params.yaml with some values changed."""
    default: Section = getattr(load_params(ROOT / "params.yaml"), name)
    return type(default).model_validate(default.model_dump() | changes)


def copies(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


KILLS = {3: None, 6: 2, 9: 4}
"""Steps at which a run is killed, before the state of that step is saved, and the step it had resumed after."""


@pytest.mark.parametrize(("method", "device"), [("full", BFLOAT16), ("full", CPU), ("lora", CPU)])
def test_sft_resumes_exactly(method: str, device: Device, checkpoint: Path, lora: Lora, tmp_path: Path) -> None:
    examples = [Example.of_response([5 + i, 6, 7], [20 + i, 21, 2][: 1 + i % 3]) for i in range(7)]
    params = section("train_sft", method=method, batch_size=2, accumulation_steps=2, num_epochs=6, eval_every=4)

    def train(recorder: Recorder, own: Checkpoints | None) -> tuple[dict[str, float], list[Tensor]]:
        model = load_on(checkpoint, device).model
        if method == "lora":
            add_adapter(model, "sft", lora, seed=0)
        policy = Role(model, "sft" if method == "lora" else None)
        held_out = {"en": examples[:2], "zh": examples[2:3]}
        metrics = train_sft(policy, examples, held_out, params, device.device, recorder, own)
        return metrics, copies(policy.parameters())

    assert_resumes_exactly(train, tmp_path, KILLS)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_reward_training_resumes_exactly(method: str, checkpoint: Path, lora: Lora, tmp_path: Path) -> None:
    message = [{"role": "user", "content": "q"}]
    rows = [
        Comparison(f"c{i}", "en", message, [i, 6], list("abc"), [[20, 2], [21, 2], [9, 2]], [0, 1, 1], ["x"] * 3, False)
        for i in range(5, 12)
    ]
    params = section("train_reward", method=method, batch_size=2, accumulation_steps=1, num_epochs=3, eval_every=3)

    def train(recorder: Recorder, own: Checkpoints | None) -> tuple[dict[str, float], list[Tensor]]:
        model = load_on(checkpoint, CPU).model
        if method == "lora":
            add_adapter(model, ADAPTER, lora, seed=0)
        head = ScalarHead(model.config.hidden_size, torch.Generator().manual_seed(0))
        role = Role(model, ADAPTER if method == "lora" else None, head)
        metrics = train_reward(role, rows, rows[:2], params, CPU.device, recorder, own)
        return metrics, [*copies(role.parameters()), head.gain.clone(), head.bias.clone()]

    assert_resumes_exactly(train, tmp_path, KILLS)


@pytest.fixture
def reward(checkpoint: Path, lora: Lora, tmp_path: Path) -> Path:
    """A LoRA reward model with a gain and a bias."""
    model = load_on(checkpoint, CPU).model
    add_adapter(model, ADAPTER, lora, seed=3)
    head = ScalarHead(model.config.hidden_size, torch.Generator().manual_seed(1))
    head.normalize(torch.tensor([0.0, 0.5, 1.5]))
    folder = tmp_path / "reward"
    folder.mkdir()
    save_reward_model(folder, Role(model, ADAPTER, head), lora, checkpoint)
    return folder


def ppo(sft: Path, reward: Path, **changes: Any) -> Train:
    """A PPO run of 11 steps with PTX and a coefficient that moves."""
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14, 15], [16]]
    ptx = [Example.of_response([5], [9, 9, 2]), Example.of_response([6, 7], [8, 2]), Example.of_response([4], [2])]
    values = {
        "num_steps": 11,
        "rollout_batch": 4,
        "generation_batch": 3,
        "ppo_epochs": 2,
        "num_minibatches": 2,
        "batch_size": 2,
        "max_new_tokens": 5,
        "ptx_coef": 0.5,
        "ptx_batch": 2,
        "kl": {"init_coef": 0.1, "target": 0.01, "horizon": 20},
    }
    params = section("train_ppo", **values, **changes)

    def train(recorder: Recorder, own: Checkpoints | None) -> tuple[dict[str, float], list[Tensor]]:
        roles = load_roles(sft, reward, params, CPU)
        metrics = train_ppo(roles, prompts, ptx, params, recorder, lambda *_: None, own)
        return metrics, copies([*roles.policy.parameters(), *roles.value_model.parameters()])

    return train


@pytest.mark.parametrize("method", ["lora", "full"])
def test_ppo_resumes_exactly(method: str, checkpoint: Path, reward: Path, lora: Lora, tmp_path: Path) -> None:
    assert_resumes_exactly(ppo(checkpoint, reward, method=method, lora=lora), tmp_path, KILLS)


def test_ppo_never_goes_on_with_another_reference(
    checkpoint: Path, reward: Path, lora: Lora, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Killed):
        ppo(checkpoint, reward, lora=lora)(Recorder(kill_at=3), checkpoints(tmp_path))
    chat = load_on(checkpoint, CPU)
    chat.model.model.norm.weight.data *= 1.01
    save_causal_lm(tmp_path / "other", chat.model, checkpoint)
    recorder = Recorder()
    ppo(tmp_path / "other", reward, lora=lora)(recorder, checkpoints(tmp_path))
    assert "starts afresh, the state of step 2 is of another run; changed since: reference" in caplog.text
    assert [step for step, _ in recorder.logged] == list(range(1, 12))


# --- the stages, as processes ---


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> faults.Campaign:
    return faults.Campaign.prepare(tmp_path_factory.mktemp("faults"), forked=True)


def statuses(campaign: faults.Campaign) -> list[str]:
    """Of the campaign's MLflow runs, the newest first."""
    client = mlflow.MlflowClient(f"sqlite:///{campaign.workspace}/mlflow.db")
    experiment = client.get_experiment_by_name("chatloom")
    assert experiment is not None
    return [run.info.status for run in client.search_runs([experiment.experiment_id])]


@pytest.mark.smoke
def test_stages_killed_twice_in_a_row_write_what_an_uninterrupted_run_writes(campaign: faults.Campaign) -> None:
    kills = campaign.run(kills=6, seed=5)
    assert {kill.stage for kill in kills} == set(faults.LOOPS)
    assert all(kill.equal for kill in kills), kills
    assert any(kill.resumed_after > 0 for kill in kills), kills
    assert set(statuses(campaign)) == {"FINISHED", "KILLED"}, "a process that is killed leaves its MLflow run as it is"


@pytest.mark.smoke
def test_sigterm_saves_the_state_of_the_step_and_the_stage_goes_on_from_there(campaign: faults.Campaign) -> None:
    campaign.forget("train_ppo")
    assert campaign.stop("train_ppo", 3, signal.SIGTERM) == 143
    assert statuses(campaign)[0] == "KILLED"
    stopped = campaign.state("train_ppo")
    assert stopped >= 3
    assert f"train_ppo: stopped; run again, it goes on after step {stopped}\n" in campaign.log()
    assert campaign.finish("train_ppo") == 0
    assert campaign.is_as_expected("train_ppo")
    assert campaign.log().count(f"train_ppo: resumes after step {stopped}\n") >= 1
