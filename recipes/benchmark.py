"""What things cost, and whether they are stable: each command prints JSON with the machine, versions and spread.

    python recipes/benchmark.py objective                  # against autograd through SVD, and against VICReg's loss
    python recipes/benchmark.py step [--device cuda]       # the dense step against the same MLM step
    python recipes/benchmark.py share                      # of an update, what the objective takes
    python recipes/benchmark.py running                    # no window of the running covariance runs away
    python recipes/benchmark.py scaling                    # by ranks, width and rows: bytes, seconds, memory
    python recipes/benchmark.py growth                     # time, memory and bytes against size; results/growth.png
    python recipes/benchmark.py data [--notes 3000000]     # notes to batches, at the size of MIMIC-IV-Note
    python recipes/benchmark.py encode                     # embeddings, against SentenceTransformer on the same folder
    python recipes/benchmark.py vectors                    # densefeat encode: memory, kills, processes, speed
    python recipes/benchmark.py marks                      # masked words held out, with masks spent on ___ and without

Timings are ratios of alternating runs in one process: medians, with the 10th and 90th percentile.
"""

import argparse
import json

from benchmarks.data import data
from benchmarks.encode import encode
from benchmarks.growth import growth
from benchmarks.marks import marks
from benchmarks.objective import objective, running
from benchmarks.scaling import scaling
from benchmarks.step import share, step
from benchmarks.timing import machine
from benchmarks.vectors import vectors


def main():
    """Run one benchmark and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    objective_parser = commands.add_parser("objective", help="loss and gradient of the objective alone")
    objective_parser.add_argument("--threads", type=int, default=1)
    objective_parser.add_argument("--repeats", type=int, default=10)
    step_parser = commands.add_parser("step", help="a training step, with and without the dense terms")
    step_parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    step_parser.add_argument("--repeats", type=int, default=10)
    share_parser = commands.add_parser(
        "share", help="the objective's share of an update, at 3, 22 and 110 M parameters"
    )
    share_parser.add_argument("--threads", type=int, default=1)
    share_parser.add_argument("--repeats", type=int, default=3)
    share_parser.add_argument("--sizes", nargs="+", default=["3 M", "22 M", "110 M"])
    running_parser = commands.add_parser("running", help="a small network trained by L_spec alone")
    running_parser.add_argument("--steps", type=int, default=1500)
    running_parser.add_argument("--seeds", type=int, default=3)
    data_parser = commands.add_parser("data", help="tables to notes, pairs, tokens and batches")
    data_parser.add_argument("--notes", type=int, default=1_000_000)
    data_parser.add_argument("--repeats", type=int, default=5)
    encode_parser = commands.add_parser("encode", help="texts to embeddings, against SentenceTransformer.encode")
    encode_parser.add_argument("--texts", type=int, default=128)
    encode_parser.add_argument("--batch_size", type=int, default=32)
    encode_parser.add_argument("--repeats", type=int, default=10)
    encode_parser.add_argument("--threads", type=int, default=1)
    encode_parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    vectors_parser = commands.add_parser("vectors", help="densefeat encode: memory, kills, processes, speed")
    vectors_parser.add_argument("--notes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parts = ["memory", "kills", "processes", "speed", "hospital"]
    vectors_parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    vectors_parser.add_argument("--kills", type=int, default=10)
    vectors_parser.add_argument("--kill_seconds", type=float, default=20)
    vectors_parser.add_argument("--compared", type=int, default=800, help="notes of the comparison of processes")
    vectors_parser.add_argument("--texts", type=int, default=512, help="notes of the comparison of speed")
    vectors_parser.add_argument("--repeats", type=int, default=3)
    vectors_parser.add_argument("--programs", type=int, default=2, help="repeats of the programs of two processes")
    vectors_parser.add_argument("--folder", help="for what is written meanwhile; default: the system's")
    marks_parser = commands.add_parser("marks", help="training with masks on de-identification marks and without")
    marks_parser.add_argument("--steps", type=int, default=120)
    marks_parser.add_argument("--seeds", type=int, default=2)
    scaling_parser = commands.add_parser("scaling", help="ranks, width and rows")
    scaling_parser.add_argument("--repeats", type=int, default=5)
    growth_parser = commands.add_parser("growth", help="what each size costs, with the exponent")
    growth_parser.add_argument("--notes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    growth_parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    commands = {
        f.__name__: f for f in (objective, step, running, scaling, data, encode, growth, marks, share, vectors)
    }
    print(json.dumps({"command": args.command, **machine(), **commands[args.command](args)}, indent=1))


if __name__ == "__main__":
    main()
