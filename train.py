"""Trains the fused model: `python train.py`, `python train.py --config conf/x.yaml --name x --trainer.max_steps 1000`."""

from pile_app.training.cli import main

if __name__ == "__main__":
    main()
