"""The stage `thought-space` as a job: `ray job submit --working-dir . -- python jobs/thought_space.py CONFIG`."""

import sys

from pulse_ray.cli import main

if __name__ == "__main__":
    main(["thought-space", *sys.argv[1:]])
