"""TensorBoard's event file, written in this thread: SummaryWriter's flush waits for no queue."""

import os
import time
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar


class Board(EventsWriter):
    """The scalars of one start of a run, from step `first` on, where a killed run's are dropped."""

    def __init__(self, directory: Path, first: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        # The name has the second, and the process too: a quick restart must not write over it.
        super().__init__(str(directory / "events"), f".{os.getpid()}")
        start = SessionLog(status=SessionLog.START)
        self.write_event(Event(wall_time=time.time(), step=first, session_log=start))

    def add(self, name: str, value: float, step: int) -> None:
        """Write one number; in the file after `flush`."""
        self.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
