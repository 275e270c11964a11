"""Train the fused model: `python train.py`, `python train.py --config text_only --name x --trainer.max_steps 1000`."""

if __name__ == "__main__":  # processes that help with the data import this file too, and need nothing of what it starts
    import sys

    from pile_app.cli import main

    main(["train", *sys.argv[1:]])
