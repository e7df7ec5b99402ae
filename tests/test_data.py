"""Windows, examples and batches: what stands in them, and that a batch is a function of seed, step and sequence."""
import time

import numpy as np
import pytest
import torch

import data
import diffusion
import train
from configurator import UserError
from data import Dataset, make_batch, step_batches, write_shard
from diffusion import LATER

V, T, P = 300, 16, 8
LENGTHS = [(5, 4), (8, 8), (8, 20), (10, 3), (16, 20), (3, 1), (1, 30), (17, 4)]        # the last one does not fit


def config(**settings):
    return train.Config(**{**dict(token_dim=6, block_size=T, prompt_size=P, batch_tokens=8 * T), **settings})


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Shards of 43 and 28 windows and a rest, and their tokens."""
    folder, rng = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    tokens = [rng.integers(V, size=43 * T + 5), rng.integers(V, size=29 * T - 1)]
    for i, shard in enumerate(tokens):
        write_shard(folder / f"train_{i}.bin", shard)
    return Dataset(folder, "train", config(), V), tokens


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Six shards of the examples LENGTHS, and instruction and response of each that fits."""
    folder, rng, pairs = tmp_path_factory.mktemp("examples"), np.random.default_rng(0), []
    for i in range(6):
        parts = [rng.integers(V, size=n) for pair in LENGTHS for n in pair]
        write_shard(folder / f"train_{i}.bin", np.concatenate(parts), LENGTHS)
        pairs += [(parts[k].tolist(), parts[k + 1].tolist()) for k in range(0, 2 * len(LENGTHS) - 2, 2)]
    return Dataset(folder, "train", config(), V), pairs


def equal(a, b):
    return all(x is y or torch.equal(x, y) if x is None or isinstance(x, torch.Tensor) else x == y
               for x, y in zip(a, b, strict=True))


# ---- what is read ----

def test_windows_and_prompts_are_the_text_in_order(text):
    dataset, tokens = text
    texts, given = dataset.read(np.arange(len(dataset)))
    assert len(dataset) == 43 + 28 and texts.loss_mask.all() and not given.any()
    places = [(shard, i) for shard in (0, 1) for i in range(len(tokens[shard]) // T)]
    for row, (shard, i) in enumerate(places):
        assert texts.idx[row].tolist() == tokens[shard][T * i:T * (i + 1)].tolist()
        before = tokens[shard][max(0, T * i - P):T * i]
        assert texts.prompt[row][texts.prompt_mask[row]].tolist() == before.tolist()
        assert texts.prompt_mask[row].tolist() == [False] * (P - len(before)) + [True] * len(before)


def test_aligned_windows_begin_with_a_document_and_see_nothing_before_it(tmp_path):
    rng, eot = np.random.default_rng(0), V - 1
    shards = [np.where(rng.random(60 * T + 3) < 0.1, eot, rng.integers(V - 1, size=60 * T + 3)) for _ in range(2)]
    shards.append(np.arange(5 * T) % (V - 1))                           # of other origin, without an end-of-text
    for i, shard in enumerate(shards):
        write_shard(tmp_path / f"train_{i}.bin", shard)
    plain, aligned, half = (Dataset(tmp_path, "train", config(), V, align) for align in (0, 1, 0.5))
    everything = np.arange(len(plain))
    for i, tiles, texts in zip(everything, plain.read(everything)[0].idx, aligned.read(everything)[0].idx, strict=True):
        shard, window = (i // 60, i % 60 * T) if i < 120 else (2, (i - 120) * T)
        begins = np.flatnonzero(shards[shard][:len(shards[shard]) - T + 1] == eot)
        start = ([*begins[begins >= window], *begins[-1:]] or [window])[0]
        assert tiles.tolist() == shards[shard][window:window + T].tolist()
        assert texts.tolist() == shards[shard][start:start + T].tolist()
    texts, _ = aligned.read(everything[:120])
    assert not texts.prompt_mask.any() and texts.loss_mask.all()
    moved = [not row.any() for row in half.read(everything[1:60])[0].prompt_mask]
    assert 20 < sum(moved) < 40
    same = [torch.equal(a, b) for a, b in zip(half.read(everything)[0].idx, plain.read(everything)[0].idx, strict=True)]
    assert 50 < sum(same) < 100


def test_examples_are_an_instruction_partly_before_the_window_and_a_response_that_is_cut(examples):
    dataset, pairs = examples
    texts, given = dataset.read(np.arange(len(dataset)))
    assert len(dataset) == len(pairs) == 42
    for row, (instruction, response) in enumerate(pairs):
        begun, before = int(given[row]), texts.prompt[row][texts.prompt_mask[row]].tolist()
        end = begun + int(texts.loss_mask[row].sum())
        assert begun == min(len(instruction), T // 2) and end == min(T, begun + len(response))
        assert before + texts.idx[row, :end].tolist() == instruction + response[:end - begun]
        assert texts.loss_mask[row].tolist() == [begun <= i < end for i in range(T)] and not texts.idx[row, end:].any()


def test_unigrams_are_counted_and_a_spread_reaches_everywhere(text):
    dataset, tokens = text
    count = np.bincount(np.concatenate(tokens), minlength=V) + 0.5
    assert np.allclose(dataset.log_unigram().exp(), count / count.sum())
    assert equal(dataset.spread(71), dataset.read(np.arange(71))[0])
    assert equal(dataset.spread(4), dataset.read([0, 17, 35, 53])[0])
    assert len(dataset.spread(100).idx.unique(dim=0)) == 71             # more than there are: some come twice


def test_an_id_beyond_the_vocabulary_names_file_id_and_place(text):
    dataset, tokens = text
    smaller = Dataset(dataset.paths[0].parent, "train", config(), 290)
    with pytest.raises(UserError) as error:
        smaller.read(np.arange(43, 71))
    at = next(i for i, token in enumerate(tokens[1]) if token >= 290)
    words = f"{dataset.paths[1]}: id {tokens[1][at]} at token {at} is not below the vocabulary of 290"
    assert words in str(error.value)
    with pytest.raises(UserError, match="not below the vocabulary"):
        make_batch(config(), smaller, 0, range(8), "cpu")


# ---- in which order ----

@pytest.mark.parametrize("n", [1, 2, 3, 100, 257])
def test_permute_visits_everything_once_in_an_order_of_each_key(n):
    orders = [data.permute(np.arange(n), n, np.full(n, key, np.uint64)).tolist() for key in (0, 1, 2 ** 64 - 1)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert n < 100 or len({tuple(order) for order in orders}) == 3 and orders[0] != list(range(n))


def test_each_epoch_holds_every_window_once_in_an_order_of_its_own(text):
    dataset, n = text[0], len(text[0])
    numbers = np.concatenate([data.window_numbers(config(), n, step) for step in range(3 * n // 8)])
    epochs = [numbers[i:i + n].tolist() for i in (0, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs) and epochs[0] != epochs[1]
    assert data.window_numbers(config(seed=2), n, 0).tolist() != epochs[0][:8]
    batch = make_batch(config(), dataset, 3, range(8), "cpu")
    assert torch.equal(batch.idx, dataset.read(numbers[24:32])[0].idx)


@pytest.mark.parametrize("kind", ["text", "examples"])
def test_a_batch_is_bitwise_the_same_on_any_number_of_processes_in_any_pieces(request, monkeypatch, kind):
    dataset = request.getfixturevalue(kind)[0]
    whole = make_batch(config(), dataset, 5, range(8), "cpu")
    for world_size in (1, 2, 4):
        for batch_size in (8, 2, 1):
            monkeypatch.setenv("WORLD_SIZE", str(world_size))
            cfg, seen = config(batch_size=batch_size), []
            for rank in range(world_size):
                monkeypatch.setenv("RANK", str(rank))
                pieces = cfg.micro_batches()
                seen += [i for piece in pieces for i in piece]
                for rows, batch in zip(pieces, step_batches(cfg, dataset, 5, pieces, "cpu"), strict=True):
                    assert len(batch.idx) == min(batch_size, 8 // world_size)
                    assert equal(batch[:-2], [x[list(rows)] for x in whole[:-2]]) and batch[-2:] == whole[-2:]
            assert sorted(seen) == list(range(8))
    assert equal(whole, make_batch(config(), dataset, 5, range(8), "cpu"))
    for seed, step in ((1, 6), (2, 5)):
        other = make_batch(config(seed=seed), dataset, step, range(8), "cpu")
        assert not any(torch.equal(getattr(whole, name), getattr(other, name)) for name in ("idx", "order", "t", "eps"))
    assert not torch.equal(whole.eps[0], whole.eps[1])


# ---- the mixture ----

def test_the_mixture_has_the_shares_that_were_asked_for():
    S, n = 4000, 64
    cfg, free = config(), torch.ones(S, n, dtype=torch.bool)
    order, length = data.choose_blocks(cfg, free, diffusion.generator("cpu", "mixture"))
    length, given, place, seen = length[:, 0], (order < 0).any(1), torch.arange(n), torch.zeros(4)
    assert abs((length == 1).sum() - 0.3 * S) <= 1 and abs((length == 0).sum() - 0.2 * S) <= 1       # stratified
    assert abs(given.sum() / S - cfg.p_given) < 0.01 and cfg.p_given == pytest.approx(1 / 6, abs=0.01)
    assert (order[(length == 0) & ~given] == 0).all() and (order[(length == 1) & ~given] == place).all()
    for i, size in enumerate((2, 4, 8, 16)):
        some = order[(length == size) & ~given]
        in_turn, spread = (some == place // size).all(1), (some == place % (n // size)).all(1)
        assert (in_turn | spread).all() and abs((length == size).sum() / S - 0.125) < 0.02
        seen[i] = spread.float().mean()
    assert abs(seen.mean() - 0.25) < 0.03
    for free_order, size in zip(order[given].tolist(), length[given].tolist(), strict=True):
        written = [number for number in free_order if number >= 0]
        assert written and max(written.count(number) for number in set(written)) <= (size or n)
    settings = dict(p_single=0, p_window=0, p_strided=1, p_given=0, max_block_length=5)
    order, length = data.choose_blocks(config(**settings), free, diffusion.generator("cpu", "other"))
    assert set(length.flatten().tolist()) == {2, 4} and (order[length[:, 0] == 4] == place % 16).all()
    order, length = data.choose_blocks(config(p_single=1, p_window=0), free, diffusion.generator("cpu", "single"))
    assert (length == 1).all()


@pytest.mark.parametrize("n", [1, 2, 3, 64])
def test_given_tokens_are_of_any_number_and_never_all(n):
    given = data.choose_given(3000, n, diffusion.generator("cpu", "given"))
    share = given.float().mean(1)
    assert not given.all(1).any() and (n == 1 or given.any(1).float().mean() > 0.3)
    if n == 64:
        assert (torch.histc(share, 5, 0, 1) / 3000 > 0.1).all()
        jumps = (given[:, 1:] != given[:, :-1]).sum(1)
        prefix = given[:, 0] & (jumps == 1)
        assert 0.3 < prefix.float().mean() < 0.5 and (jumps > 16).float().mean() > 0.15
        assert ((jumps > 1) & (jumps <= 16)).any()


def test_noise_levels_are_one_for_a_block_stratified_and_highest_for_single_tokens():
    S, n, rng = 500, 64, diffusion.generator("cpu", "levels")
    place = torch.arange(n).expand(S, -1)
    window = data.noise_levels(config(), place * 0, torch.zeros(S, 1, dtype=torch.int64), rng)
    assert (window == window[:, :1]).all()
    u = torch.sigmoid(torch.logit((window[:, 0].double() - 0.5) / 1000) / data.BELL)    # one in each part of the range
    assert (u.sort().values - (torch.arange(S) + 0.5) / S).abs().max() < 3 / S
    blocks = data.noise_levels(config(), place // 4, torch.full((S, 1), 4), rng)
    assert (blocks.view(S, -1, 4) == blocks.view(S, -1, 4)[..., :1]).all() and (blocks[:, ::4].diff(dim=1) != 0).all()
    edges = torch.sigmoid(torch.logit(torch.linspace(0, 1, 11, dtype=torch.float64)) / data.BELL)
    for levels in (blocks[:, ::4], blocks[:, 60]):          # more of them in the middle
        assert (torch.histc(levels.float(), 10, 1, 1000) / levels.numel() - edges.diff()).abs().max() < 0.005
    assert 1 <= blocks.min() < 20 and 980 < blocks.max() <= 1000
    singles = (place, torch.ones(S, 1, dtype=torch.int64), rng)
    assert (data.noise_levels(config(), *singles) == 1000).all()
    every = data.noise_levels(config(objective="eps"), *singles)
    assert (torch.histc(every.float(), 10, 1, 1000) / every.numel() - 0.1).abs().max() < 0.005
    two = data.noise_levels(config(timesteps=2), place // 4, torch.full((S, 1), 4), rng)
    assert two.unique().tolist() == [1, 2]


def test_prompts_are_of_random_length_and_sometimes_withheld(text, examples):
    cfg = config(conditioning_dropout=0.25, batch_tokens=4000 * T)
    seen = make_batch(cfg, text[0], 0, range(4000), "cpu").prompt_mask
    number = seen.sum(1)
    assert (seen == (torch.arange(P) >= P - number[:, None])).all()                # those next to the text
    share = torch.bincount(number, minlength=P + 1) / 4000
    first = 2 / 71                                                                # of windows nothing is before
    assert abs(share[0] - 0.25 - 0.75 * first) < 0.02 and (share[1:] - 0.75 * (1 - first) / P).abs().max() < 0.02
    dropped = make_batch(config(conditioning_dropout=1), text[0], 0, range(8), "cpu")
    assert not dropped.prompt_mask.any()
    shown = make_batch(config(conditioning_dropout=0), examples[0], 0, range(8), "cpu").prompt_mask
    texts = examples[0].read(data.window_numbers(cfg, 42, 0)[:8])[0]
    assert torch.equal(shown, texts.prompt_mask)                                    # all of an instruction


def test_an_instruction_is_given_or_withheld_and_padding_is_of_no_block(examples):
    cfg = config(conditioning_dropout=0.5, batch_tokens=420 * T, p_given=0)
    batch = make_batch(cfg, examples[0], 0, range(420), "cpu")
    texts, given = examples[0].read(data.window_numbers(cfg, 42, 0))
    begun, before = torch.arange(T) < given[:, None], texts.prompt_mask.any(1)
    withheld = (batch.order[:, 0] == LATER)[:, None]
    assert 0.4 < withheld.float().mean() < 0.6 and torch.equal(batch.loss_mask, texts.loss_mask)
    assert (batch.order[begun & withheld] == LATER).all() and (batch.order[begun & ~withheld] == -1).all()
    assert torch.equal(batch.prompt_mask.any(1), before & ~withheld[:, 0])          # withheld as a whole
    assert (batch.order[~texts.loss_mask & ~begun] == LATER).all()
    assert ((batch.order[texts.loss_mask] >= 0) & (batch.order[texts.loss_mask] < T)).all()
    cfg = config(conditioning_dropout=0, batch_tokens=420 * T, p_given=1)
    more = make_batch(cfg, examples[0], 0, range(420), "cpu")
    free = more.loss_mask & (more.order >= 0)
    assert free.any(1).float().mean() > 0.7 and (more.order[begun] == -1).all()


def test_only_windows_as_a_whole_need_no_order(text, examples):
    whole = dict(p_window=1, p_single=0, p_given=0)
    assert make_batch(config(**whole), text[0], 0, range(8), "cpu").order is None
    for dataset, settings in ((examples[0], {}), (text[0], dict(p_given=0.1)), (text[0], dict(p_window=0.9))):
        assert make_batch(config(**{**whole, **settings}), dataset, 0, range(8), "cpu").order.shape == (8, T)


def test_the_guess_is_decided_once_for_a_step_and_in_a_share_of_them(text):
    def guesses(share, steps):
        cfg, made = config(self_conditioning=share, batch_size=4), []
        for step in range(steps):
            first, second = step_batches(cfg, text[0], step, cfg.micro_batches(), "cpu")
            assert first.guess == second.guess
            made.append(first.guess)
        return sum(made) / steps
    assert guesses(0, 30) == 0 and guesses(1, 30) == 1 and abs(guesses(0.3, 400) - 0.3) < 0.07


@pytest.mark.slow
def test_a_batch_of_micro_is_made_in_less_time_than_a_step_takes(tmp_path):
    write_shard(tmp_path / "train.bin", np.random.default_rng(0).integers(50257, size=5_000_000))
    best = {}
    for C in (1, 136):                                  # hardly any noise, and all of it
        cfg = train.Config(batch_tokens=64 * 512, token_dim=C)
        dataset, best[C] = Dataset(tmp_path, "train", cfg, 50257), 1e9
        for step in range(10):
            clock = time.perf_counter()
            make_batch(cfg, dataset, step, range(64), "cpu")
            best[C] = min(best[C], 1000 * (time.perf_counter() - clock))
    assert best[1] < 60 and best[136] < 300, best
