"""Trains as a run says, and writes the first entry of its log.

torchrun train_and_log.py LOG.json RUN.yaml [--key value ...]
"""

import json
import sys
from pathlib import Path

from samoe_hf.training.trainer import build_trainer

trainer = build_trainer(sys.argv[2:])
trainer.train()
if trainer.is_world_process_zero():
    Path(sys.argv[1]).write_text(json.dumps(trainer.state.log_history[0]))
