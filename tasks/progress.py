"""A stage's progress lines as a progress artifact in Prefect's UI."""

from __future__ import annotations

import re
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

LINE = re.compile(
    r"(?:.* )?(?P<loop>\S+) (?P<done>\d+)/(?P<total>\d+)  (?P<shown>.*?)\s*(?P<rate>[\d.e+-]+)/s  (?P<left>\S+) left"
)
"""As `chatloom.progress` writes it where there is no terminal."""


class ProgressArtifact:
    """The share that is done, with the values, rate and time left of the loop; made by its first line."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self._id: UUID | None = None

    def read(self, line: str) -> None:
        found = LINE.fullmatch(line)
        if found is None:
            return
        part = 100 * int(found["done"]) / int(found["total"])
        what = f"{found['loop']}: {found['done']} of {found['total']}, {found['rate']} a second, {found['left']} left"
        if found["shown"]:
            what += f" ({found['shown']})"
        if self._id is None:
            made = create_progress_artifact(part, key=f"progress-{self.stage.replace('_', '-')}", description=what)
            assert isinstance(made, UUID)
            self._id = made
        else:
            update_progress_artifact(self._id, part, description=what)
