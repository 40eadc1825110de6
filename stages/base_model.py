"""DVC stage `base_model`: fetch or make the model that everything starts from."""

from chatloom.device import resolve_device
from chatloom.models.base import make_base_model
from stages.run import stage


def main() -> None:
    with stage("base_model") as run:
        runtime = run.params.runtime
        device = resolve_device(runtime.device, runtime.dtype, runtime.num_threads)
        with run.out("models/base") as folder:
            metrics = make_base_model(run.params.base_model, device.dtype, folder)
        run.metrics(metrics)


if __name__ == "__main__":
    main()
