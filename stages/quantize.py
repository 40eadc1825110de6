"""DVC stage `quantize`: the PPO model at few bits, compared with what it was."""

from pathlib import Path

from chatloom.data.prepared import read_split
from chatloom.device import resolve_device
from chatloom.quantization.comparison import by_layer, compare
from chatloom.quantization.figure import draw
from chatloom.quantization.gptq import calibration_rows, quantize
from stages.run import stage

MODEL, CALIBRATION, HELD_OUT = Path("models/ppo"), Path("data/prepared/ptx"), Path("data/prepared/eval")


def main() -> None:
    with stage("quantize") as run:
        params, runtime = run.params.quantize, run.params.runtime
        device = resolve_device(runtime.device, runtime.dtype, runtime.num_threads)
        run.dataset(CALIBRATION, "calibration")
        run.dataset(HELD_OUT, "held_out")
        rows = calibration_rows(read_split(CALIBRATION), params)
        with run.out("models/chat-4bit") as folder:
            metrics = quantize(MODEL, folder, rows, params)
            comparison = compare(MODEL, folder, read_split(HELD_OUT), params, device)
        for layer, errors in by_layer(comparison.layers).items():
            run.log(layer, errors)
        run.figure("quantize", draw(comparison.layers, comparison.metrics, params.bits))
        run.metrics(metrics | comparison.metrics)


if __name__ == "__main__":
    main()
