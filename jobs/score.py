"""Batch scoring as a job: `ray job submit --working-dir . -- python jobs/score.py CONFIG --input URI --output URI`."""

import sys

from pulse_ray.cli import main

if __name__ == "__main__":
    main(["score", *sys.argv[1:]])
