"""What holds for all tests: one thread each, as several processes of them run side by side."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported
