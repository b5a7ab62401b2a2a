"""The stage `candidates` as a job: `ray job submit --working-dir . -- python jobs/candidates.py CONFIG`."""

import sys

from pulse_ray.cli import main

if __name__ == "__main__":
    main(["candidates", *sys.argv[1:]])
