"""DVC stage `quantize`: the PPO model at 4 bit."""

from pathlib import Path

from chatloom.data.prepared import read_split
from chatloom.device import resolve_device
from chatloom.quantization import calibration_rows, quantize
from stages.run import stage

MODEL, CALIBRATION = Path("models/ppo"), Path("data/prepared/ptx")


def main() -> None:
    with stage("quantize") as run:
        params, runtime = run.params.quantize, run.params.runtime
        resolve_device(runtime.device, runtime.dtype, runtime.num_threads)
        run.dataset(CALIBRATION, "calibration")
        rows = calibration_rows(read_split(CALIBRATION), params)
        with run.out("models/chat-4bit") as folder:
            metrics = quantize(MODEL, folder, rows, params)
        run.metrics(metrics)


if __name__ == "__main__":
    main()
