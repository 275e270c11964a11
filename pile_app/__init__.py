"""Pile: train one language model that reads and writes text, images and sound."""

import os

# GCC's OpenMP lets idle threads spin for so long that any other busy process slows training tenfold (measured, 2 cores); with
# this it is a fair share, at 5 % less speed on an idle machine. Has to stand before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
