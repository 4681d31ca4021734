"""Fine-tuned and frozen sentence vectors against VADER's own rules, on the same test rows.

Run it with `make bench-sentiment`, after recipes/sentiment.yaml and recipes/sentiment-tuned.yaml have run.
VADER (Hutto & Gilbert 2014) was made from tweets like these; its rules know no training split.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from results import keep
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from headstart import environment
from headstart.layout import Layout
from headstart.metrics import scores

ROOT = environment.project_root(Path(__file__).parent)


def main() -> None:
    """Print the table, write the figures."""
    layout = Layout(ROOT, "sentiment-tuned")
    rows = pd.read_parquet(layout.manifest / "manifest.parquet")
    rows = rows[rows["split"] == "test"].set_index("id")
    truth = (rows["label"] == "positive").to_numpy(np.int64)
    analyser = SentimentIntensityAnalyzer()
    compound = np.array([analyser.polarity_scores(text)["compound"] for text in rows["text"]])
    ways = {"VADER's rules": np.stack([1 - compound, 1 + compound], axis=1) / 2}
    for way, name in (("frozen features", "sentiment"), ("fine-tuned", "sentiment-tuned")):
        table = pd.read_parquet(Layout(ROOT, name).model / "predictions.parquet").set_index("id")
        ways[way] = table.loc[rows.index, ["p:negative", "p:positive"]].to_numpy(np.float64)
    figures = {}
    domains = ["all", *sorted(set(rows["domain"]))]
    print("| macro-F1 | " + " | ".join(domains) + " |\n|" + "---|" * (len(domains) + 1))
    for way, probabilities in ways.items():
        cells = []
        for domain in domains:
            chosen = np.ones(len(rows), bool) if domain == "all" else (rows["domain"] == domain).to_numpy()
            found = scores(truth[chosen], probabilities[chosen])
            figures |= {
                f"{way}, {domain}, {metric}": round(found[metric], 4) for metric in ("macro_f1", "accuracy")
            }
            cells.append(f"{found['macro_f1']:.3f}")
        print(f"| {way} | " + " | ".join(cells) + " |")
    keep("sentiment", figures)


if __name__ == "__main__":
    main()
