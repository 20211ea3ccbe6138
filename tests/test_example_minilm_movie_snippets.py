"""The example of MiniLM: its data, its batches, and all of it with a tiny BERT and made-up sentences."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastprune as fp

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    import minilm_movie_snippets

    return minilm_movie_snippets


class Words:
    """A tokenizer of words: their lengths, between 101 and 102."""

    sep_token_id = 102

    def __call__(self, texts, verbose):
        return {"input_ids": [[101, *(len(word) for word in text.split()), 102] for text in texts]}


@pytest.fixture
def snippets(example):
    """Sentences of 3 to 34 tokens, in which the class is the token that comes most."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(150):
        label, length = index % 2, 1 + int(torch.randint(32, (), generator=generator))
        words = torch.where(torch.rand(length, generator=generator) < 0.8, 5 + label, 6 - label)
        made.append(example.Snippet([1, *words.tolist(), 2][:32], label))
    return made


def tiny(example):
    transformers = pytest.importorskip("transformers", reason="needs pip install transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=10,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return example.SentenceClassifier(transformers.BertModel(config, add_pooling_layer=False)).eval()


def test_ratings_become_labels_and_neutral_or_repeated_snippets_go(example, tmp_path):
    path = tmp_path / "snippets.txt"
    lines = ["1\t2.3\tcliché", "2\t-0.6\tbad", "3\t0.5\tso", "4\t-0.5\tso so", "5\t-3\tcliché", ""]
    path.write_bytes("\r\n".join(lines).encode("utf-8"))
    assert example.read_snippets(path) == (["cliché", "bad"], [1, 0])


@pytest.mark.parametrize("line", ["1\t2.3", "1\tgood\t2.3", "1\t2.3\tgood\tfilm", ""])
def test_a_line_of_another_form_is_refused_by_its_number(example, tmp_path, line):
    path = tmp_path / "snippets.txt"
    path.write_text(f"1\t2.3\tgood\n{line}\n3\t1\tfine\n")
    with pytest.raises(ValueError, match=r"snippets\.txt, line 2: expected id, rating and text"):
        example.read_snippets(path)


def test_long_snippets_are_cut_before_their_last_token(example):
    texts = ["a bb ccc", " ".join(["dd"] * 30), " ".join(["dd"] * 31)]
    snippets, cut = example.tokenize(Words(), texts, [1, 0, 1])
    assert snippets[0] == ([101, 1, 2, 3, 102], 1)
    assert snippets[1] == snippets[2]._replace(label=0) == ([101, *[2] * 30, 102], 0)
    assert cut == pytest.approx(1 / 3)


def test_parts_are_disjoint_whole_and_the_same_in_each_run(example):
    snippets = [example.Snippet([index], index % 2) for index in range(50)]
    parts = example.split(snippets, 7, 11)
    assert [len(part) for part in parts] == [32, 7, 11]
    assert sorted(snippet.tokens[0] for part in parts for snippet in part) == list(range(50))
    torch.manual_seed(1)
    assert example.split(snippets, 7, 11) == parts


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("count", [1, 15, 16, 17, 129])
def test_batches_hold_each_snippet_once_padded_to_the_longest(example, snippets, shuffle, count):
    batches = example.Batches(snippets[:count], 4, shuffle=shuffle, pad=9)
    seen = []
    for batch in batches:
        lengths = batch["attention_mask"].sum(1)
        assert batch["input_ids"].shape == (len(lengths), int(lengths.max()))
        for ids, mask, label in zip(*batch.values(), strict=True):
            assert (ids[mask == 0] == 9).all()
            seen.append((ids[mask == 1].tolist(), int(label)))
    assert sorted(seen) == sorted(map(tuple, snippets[:count]))
    assert len(list(batches)) == len(batches)


def test_shuffled_batches_differ_each_time_and_repeat_with_the_seed(example, snippets):
    batches = example.Batches(snippets, 4, shuffle=True)

    def drawn():
        return [batch["input_ids"].tolist() for batch in batches]

    torch.manual_seed(3)
    first, second = drawn(), drawn()
    torch.manual_seed(3)
    assert first == drawn() != second


def test_padding_changes_no_logit(example, snippets):
    model = tiny(example)
    short = min(snippets, key=lambda snippet: len(snippet.tokens))
    long = max(snippets, key=lambda snippet: len(snippet.tokens))
    alone, together = example.collate([short], 0), example.collate([short, long], 0)
    assert alone["input_ids"].shape[1] < together["input_ids"].shape[1]
    with torch.no_grad():
        logits = [model(batch["input_ids"], batch["attention_mask"])[0] for batch in (alone, together)]
    torch.testing.assert_close(*logits)


def test_the_learning_rate_rises_and_falls_to_zero(example):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    schedule = example.warm_up_then_fall(optimizer, 20)
    rates = []
    for _ in range(21):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] == 0


@pytest.mark.usefixtures("sparse_is_faster")
def test_the_whole_example_prunes_the_projections_alone_and_goes_on_from_its_folder(
    example, snippets, tmp_path, monkeypatch, capsys
):
    parts = example.split(snippets, 30, 70)
    train = example.Batches(parts[0], 8, shuffle=True)
    validation, test = (example.Batches(part, 16, shuffle=False) for part in parts[1:])
    inputs = example.example_inputs([example.Snippet([1] * 32, 0)] * 3)

    def run():
        dense = example.trained(tiny(example), train, validation, epochs=1, checkpoint_dir=tmp_path)
        result = example.shorten(
            dense, train, validation, criterion="magnitude", example_inputs=inputs, rounds=2, epochs=1,
            checkpoint_dir=tmp_path / "magnitude", progress=False,
        )  # fmt: skip
        return dense, result

    dense, result = run()
    sparse = {
        name for name, module in result.model.named_modules() if isinstance(module, fp.BlockSparseLinear)
    }
    kinds = (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
    assert sparse == {f"bert.encoder.layer.{layer}.{kind}" for layer in range(2) for kind in kinds}
    assert result.history[-1]["sparsity"] == 0.75
    assert result.model.head.weight.count_nonzero() == 2 * 64

    rows = example.measure(dense, {"magnitude": result}, test, inputs)
    example.print_table(rows)
    printed = capsys.readouterr().out
    assert [row.name for row in rows] == ["dense", "magnitude"]
    assert rows[0].accuracy == fp.evaluate(dense, test)["accuracy"]
    assert rows[1].accuracy == fp.evaluate(result.model, test)["accuracy"]
    encoder = 2 * (4 * 64 * 64 + 2 * 64 * 128)
    assert rows[0].parameters - rows[1].parameters == 0.75 * encoder
    assert rows[0].flops - rows[1].flops == 0.75 * encoder * 2 * 3 * 32
    assert f"{rows[1].accuracy:.2%}    75.0%" in printed

    monkeypatch.delattr(example, "fine_tune")
    again, repeated = run()
    assert repeated.history == result.history
    for name, value in dense.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
