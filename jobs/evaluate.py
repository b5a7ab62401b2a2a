"""The stage `evaluate` as a job: `ray job submit --working-dir . -- python jobs/evaluate.py CONFIG`."""

import sys

from pulse_ray.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
