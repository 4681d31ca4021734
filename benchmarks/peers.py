"""Domain adaptation by the shallow methods of skada and ADAPT, on features and splits that another chose.

Requirements, in an environment of their own (`benchmarks/peers.txt`): skada==0.6.0 adapt==0.4.5
scikit-learn==1.9.1 numpy==2.4.6 scipy==1.17.1 POT==0.9.7.post1 tensorflow==2.21.0 keras==3.15.1.

Run `python peers.py IN.npz OUT.npz`, or `python peers.py FOLDER` for each `*.in.npz` there, to `*.out.npz`.
IN holds source float32 [n, d], labels int64 [n], target float32 [m, d], test float32 [j, d], seed, and
perhaps weights float64 [n] and balanced (0 or 1). OUT holds for each method M, as in `skada.CORAL`:

    M                labels int64 [j]
    probabilities.M  float64 [j, k], a column per class in the order of `classes`
    seconds.M        to fit and to predict the test rows

and in `name.skada.chosen` what `skada.chosen` is. No target labels go in. A method that fails is named on
stdout and left out.

Every method has its package's defaults, but for the three named at `WHOLE`, behind a StandardScaler fitted on
both domains (`skada.PerDomain`: on each) and before a logistic regression. Methods that build an n x n matrix
get at most 1,000 rows per domain, drawn at random. Weights reach the regression, except where a reweighting
adapter of skada puts its own in their place; ADAPT multiplies the two.

`skada.chosen` is the best by CircularValidation among the methods of `GRIDS`, which take all rows. Of the
unsupervised scorers in skada's own benchmark this one is the best for the most methods, 9 of 20, and for the
method ranked first ("scorer_best" in skada-bench 1.0.0, table_results_all_dataset_unsupervised_accuracy;
arXiv 2407.11676). Grids and splits are that benchmark's, the grids thinned.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import skada
from adapt import feature_based, instance_based
from skada.metrics import CircularValidation
from skada.model_selection import StratifiedDomainShuffleSplit
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.preprocessing import StandardScaler
from sklearn.utils import resample

Arrays = dict[str, np.ndarray]
SOURCE, TARGET = 1, -2  # skada's own numbers for the domains
MOST = 1000  # rows per domain where memory grows with their square
SPLITS, HELD_OUT = 5, 0.2

# The step between scaler and classifier. Two rows of 256 scaled columns lie about 512 apart, squared, so that
# the default gamma of 1 leaves KLIEP and MMDTarS a kernel of zeros (KLIEP fails), and EntropicOT without a
# norm takes 60 times as long: these three have a value out of skada-bench's grids instead.
WHOLE: dict[str, Any] = {
    "SourceOnly": None,
    "CORAL": skada.CORALAdapter(),
    "LinearOT": skada.LinearOTMappingAdapter(),
    "MultiLinearMonge": skada.MultiLinearMongeAlignmentAdapter(),
    "SubspaceAlignment": skada.SubspaceAlignmentAdapter(),
    "GaussianReweight": skada.GaussianReweightAdapter(),
    "DiscriminatorReweight": skada.DiscriminatorReweightAdapter(),
    "NearestNeighborReweight": skada.NearestNeighborReweightAdapter(),
    "KLIEP": skada.KLIEPReweightAdapter(gamma="auto"),
}
SQUARE: dict[str, Any] = {
    "DensityReweight": skada.DensityReweightAdapter(),
    "KMM": skada.KMMReweightAdapter(),
    "MMDTarS": skada.MMDTarSReweightAdapter(gamma=None),
    "OTMapping": skada.OTMappingAdapter(),
    "EntropicOT": skada.EntropicOTMappingAdapter(norm="median"),
    "ClassRegularizerOT": skada.ClassRegularizerOTMappingAdapter(),
    "OTLabelProp": skada.OTLabelPropAdapter(),
    "TCA": skada.TransferComponentAnalysisAdapter(),
    "TJM": skada.TransferJointMatchingAdapter(),
}
GRIDS: dict[str, dict[str, list[Any]]] = {
    "SourceOnly": {},
    "PerDomain": {},
    "CORAL": {"coraladapter__assume_centered": [False, True]},
    "LinearOT": {"linearotmappingadapter__reg": [1e-8, 0.1, 1, 10]},
    "SubspaceAlignment": {"subspacealignmentadapter__n_components": [10, 50, 100]},
    "DiscriminatorReweight": {},
}
ADAPT_WHOLE = [
    feature_based.CORAL,
    feature_based.SA,
    instance_based.KLIEP,
    instance_based.ULSIF,
    instance_based.RULSIF,
    instance_based.NearestNeighborsWeighting,
    instance_based.IWC,
]
ADAPT_SQUARE = [feature_based.TCA, instance_based.KMM]  # fMMD: over 3 minutes at 256 columns


def classifier(given: Arrays) -> LogisticRegression:
    balanced = bool(given.get("balanced", 0))
    return LogisticRegression(class_weight="balanced" if balanced else None, max_iter=1000)


def pipeline(name: str, given: Arrays) -> Any:
    """A pipeline of skada with a method's defaults."""
    scaler = StandardScaler().set_fit_request(sample_weight=False)
    last = classifier(given).set_fit_request(sample_weight=True)
    if name == "PerDomain":
        return skada.make_da_pipeline(skada.PerDomain(scaler), last)
    if name == "JDOT":
        return skada.make_da_pipeline(scaler, skada.JDOTClassifier(last).set_fit_request(sample_weight=True))
    adapter = (WHOLE | SQUARE)[name]
    return skada.make_da_pipeline(scaler, *([] if adapter is None else [adapter]), last)


def few(given: Arrays) -> Arrays:
    """The same with at most MOST rows of each domain, the source's classes in their proportions."""
    seed, labels = int(given["seed"]), given["labels"]
    rows = np.arange(len(labels))
    if len(rows) > MOST:
        rows = resample(rows, replace=False, n_samples=MOST, random_state=seed, stratify=labels)
    there = np.random.default_rng(seed).permutation(len(given["target"]))[:MOST]
    drawn = {key: given[key][rows] for key in ("source", "labels", "weights")}
    return given | drawn | {"target": given["target"][there]}


def stacked(given: Arrays) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Rows, labels with -1 for the target, and what else skada's `fit` takes."""
    n, m = len(given["source"]), len(given["target"])
    labels = np.concatenate([given["labels"], np.full(m, -1)])
    domains = np.repeat([SOURCE, TARGET], [n, m])
    weights = np.concatenate([given["weights"], np.ones(m)])
    rows = np.concatenate([given["source"], given["target"]])
    return rows, labels, {"sample_domain": domains, "sample_weight": weights}


def predicted(model: Any, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    there = {"sample_domain": np.full(len(test), TARGET)}
    return model.predict(test, **there), model.predict_proba(test, **there)


def by_skada(name: str, given: Arrays) -> tuple[np.ndarray, np.ndarray]:
    rows, labels, more = stacked(given)
    return predicted(pipeline(name, given).fit(rows, labels, **more), given["test"])


def chosen(given: Arrays) -> tuple[np.ndarray, np.ndarray, str]:
    """The best of GRIDS by CircularValidation, fitted on all rows; its name and settings with it."""
    rows, labels, more = stacked(given)
    split = StratifiedDomainShuffleSplit(SPLITS, test_size=HELD_OUT, random_state=int(given["seed"]))
    found = {}
    for name, grid in GRIDS.items():
        search = GridSearchCV(pipeline(name, given), grid, scoring=CircularValidation(), cv=split)
        found[name] = search.fit(rows, labels, **more)
    best = max(found, key=lambda name: np.nan_to_num(found[name].best_score_, nan=-1))
    settings = [f"{key.split('__')[1]}={value}" for key, value in found[best].best_params_.items()]
    return *predicted(found[best].best_estimator_, given["test"]), " ".join([best, *settings])


def by_adapt(method: Any, given: Arrays) -> tuple[np.ndarray, np.ndarray]:
    scaler = StandardScaler().fit(np.concatenate([given["source"], given["target"]]))
    source, target, test = (scaler.transform(given[key]) for key in ("source", "target", "test"))
    model = method(classifier(given), Xt=target, verbose=0, random_state=int(given["seed"]))
    model.fit(source, given["labels"], sample_weight=given["weights"].copy())  # it writes into them
    embedded = model.transform(test) if hasattr(model, "transform") else test
    return model.predict(test), model.estimator_.predict_proba(embedded)


def run(given: Arrays) -> Arrays:
    """Every method on one set of features."""
    given = {"weights": np.ones(len(given["labels"]))} | given
    for key in ("source", "target", "test"):
        given[key] = given[key].astype(np.float64)
    small, classes = few(given), np.unique(given["labels"])
    jobs: dict[str, Callable[[], tuple]] = {}
    for names, data in ((["PerDomain", *WHOLE], given), ([*SQUARE, "JDOT"], small)):
        jobs |= {f"skada.{name}": lambda name=name, data=data: by_skada(name, data) for name in names}
    jobs["skada.chosen"] = lambda: chosen(given)
    for methods, data in ((ADAPT_WHOLE, given), (ADAPT_SQUARE, small)):
        jobs |= {f"adapt.{m.__name__}": lambda m=m, data=data: by_adapt(m, data) for m in methods}
    out: Arrays = {"classes": classes}
    for name, job in jobs.items():
        np.random.seed(int(given["seed"]))  # for those that take no seed
        start = time.perf_counter()
        try:
            labels, probabilities, *settings = job()
        except Exception as error:  # each package fails in its own ways
            print(
                f"{name} left out: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:150]}"
            )
            continue
        out[f"seconds.{name}"] = np.array(time.perf_counter() - start)
        out[name] = np.asarray(labels).astype(np.int64)
        if np.shape(probabilities) == (len(labels), len(classes)):
            out[f"probabilities.{name}"] = np.asarray(probabilities, np.float64)
        if settings:
            out[f"name.{name}"] = np.array(settings[0])
    return out


def main() -> None:
    warnings.simplefilter("ignore")
    first = Path(sys.argv[1])
    pairs = [(first, Path(sys.argv[2]))] if len(sys.argv) > 2 else []
    for path in sorted(first.glob("*.in.npz")) if not pairs else []:
        pairs.append((path, path.with_name(path.name.removesuffix(".in.npz") + ".out.npz")))
    for source, destination in pairs:
        np.savez(destination, **run(dict(np.load(source))))
        print(f"{destination} written", flush=True)


if __name__ == "__main__":
    main()
