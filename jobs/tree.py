"""The stage `tree` as a job: `ray job submit --working-dir . -- python jobs/tree.py CONFIG`."""

import sys

from pulse_ray.cli import main

if __name__ == "__main__":
    main(["tree", *sys.argv[1:]])
