"""Pile: train one language model that reads and writes text, images and sound."""

import os

# Idle threads of GCC's OpenMP spin for so long that any other busy process slows training tenfold (measured, 2 cores). This
# limits the spinning, at 5 to 7 % less speed on an idle machine. It must be set before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
