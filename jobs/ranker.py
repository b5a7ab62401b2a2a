"""The stage `ranker` as a job: `ray job submit --working-dir . -- python jobs/ranker.py CONFIG`."""

import sys

from pulse_ray.cli import main

if __name__ == "__main__":
    main(["ranker", *sys.argv[1:]])
