"""The excerpt of MedQuAD that the first run trains and measures on, from the whole of it.

    python recipes/make_excerpt.py --answers answers.parquet --out recipes/data/medquad

`answers.parquet` has one row an answer: document_id, order, text, question, question_type, focus, semantic_type, source,
split (by disease: no disease is in two parts). Documents are drawn at random, whole; of a text the first 110 words stay,
which is what an encoder of 96 tokens sees, and more. See recipes/data/medquad/README.md for source and licence.
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

WORDS = 110
ANSWERS = {"train": 3600, "validation": 400, "test": 1400}
TYPES = {"T047": "disease", "T019": "congenital", "T191": "neoplasm", "T048": "mental", "T046": "pathologic function"}


def main() -> None:
    """Read, draw, cut, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", required=True)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    table = pq.read_table(arguments.answers).to_pandas()
    table["order"] = table["order"].astype(int)
    table = table.sort_values(["document_id", "order"], kind="stable")
    # one document of MedQuAD is about diseases of two parts: it is left out
    table = table[table.groupby("document_id")["split"].transform("nunique") == 1]
    kept = []
    for split, count in ANSWERS.items():
        part = table[table["split"] == split]
        size = part.groupby("document_id", sort=True)["order"].transform("size")
        part = part[size > 1] if split == "train" else part  # a document of one answer has no pair to train on
        documents = np.random.default_rng(0).permutation(sorted(part["document_id"].unique()))
        sizes = part.groupby("document_id").size()[documents].cumsum()
        kept.append(part[part["document_id"].isin(sizes.index[sizes <= count])])
    rows = table.loc[np.concatenate([part.index for part in kept])].sort_index()
    rows = rows.sort_values(["document_id", "order"], kind="stable")
    out = pa.table(
        {
            "document_id": rows["document_id"].to_list(),
            "order": rows["order"].to_list(),
            "text": [" ".join(text.split()[:WORDS]) for text in rows["text"]],
            "question": rows["question"].to_list(),
            "kind": rows["question_type"].to_list(),
            "disease": [name or one for name, one in zip(rows["focus"], rows["document_id"], strict=True)],
            "type": [TYPES.get(code) for code in rows["semantic_type"]],
            "source": rows["source"].to_list(),
            "split": rows["split"].to_list(),
        }
    )
    Path(arguments.out).mkdir(parents=True, exist_ok=True)
    pq.write_table(out, Path(arguments.out) / "answers.parquet", compression="zstd", compression_level=19)
    print(out.num_rows, {name: (rows["split"] == name).sum() for name in ANSWERS})


if __name__ == "__main__":
    main()
