"""DVC stage `train_gold`: a reward model from comparisons that the other one never saw, so that PPO is judged by it."""

from stages.train_reward import train
from stages.training import start


def main() -> None:
    train("train_gold", "models/gold", gold=True)


if __name__ == "__main__":
    start("train_gold", main)
