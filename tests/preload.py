"""Imports of the server that commands are forked from (see `processes.py`).

Including imports that Lightning and we defer: `ModelCheckpoint` imports s3fs to see whether a local folder is on S3, for half a
second.
"""

from __future__ import annotations

import omegaconf  # noqa: F401
import s3fs  # noqa: F401
import torchaudio  # noqa: F401
import wandb  # noqa: F401

import pile_app.model.generate
import pile_app.training.callbacks
import pile_app.training.checkpoints
import pile_app.training.cli
import pile_app.training.report
import pile_app.training.run  # noqa: F401
from pile_app.cli import COMMANDS, load_command

for command in COMMANDS:
    load_command(command)
