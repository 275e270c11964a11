"""Trains the fused model: `python train.py`, `python train.py --config conf/x.yaml --name x --trainer.max_steps 1000`."""

if __name__ == "__main__":  # processes that help with the data import this file too, and need nothing of what it starts
    from pile_app.training.cli import main

    main()
