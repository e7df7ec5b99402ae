"""
Networks on disk: checkpoints of a run, exports to be shared, adapters, and GPT-2's token vectors.

A checkpoint is one file of plain types and tensors, written whole or not at all and checked before use. An export is a
folder of model.safetensors, config.json and tokenizer.json, which may also come from the Hugging Face hub as
hf:user/name.
"""
import dataclasses
import hashlib
import json
import shutil
import sys
import typing
import zipfile
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
import torch.nn as nn
from torch.utils._pytree import tree_leaves, tree_map

from configurator import Fault, UserError, check_fields, parse_json, printable, read_file, replacing
from machine import world_size
from model import GPT2_DIM, ModelConfig, SunFish, add_lora, merge_lora, quantize

LABELS = ("label", "licence", "kind", "fingerprint")                    # of the text
FORMAT = 5                                                              # of checkpoints and exports
CKPT = f"ckpt_{8 * '[0-9]'}.pt"                                         # the files of a run, no copies beside them
USUAL = dict.fromkeys(("block_length", "revisions"), (int, 0, 1e6))     # settings of sample.py that it keeps
MEASURED = dict(tokens=(int, 0, 1e18), bound=(float, 0, 1e6), bound_error=(float, 0, 1e6))
EXPORT = ("model.safetensors", "config.json", "tokenizer.json")         # the files of an export
KINDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}                # in safetensors' words


def reason(error):
    """The first line of an exception's message, or its name."""
    return (str(error) or type(error).__name__).splitlines()[0]


# ---- files ----

def write(path, content):
    """Write a dict of plain types and tensors, whole or not at all; Fault if that fails."""
    try:
        with replacing(path) as file:
            torch.save(dict(format=FORMAT, **content), file)
    except (OSError, RuntimeError) as error:            # a full disk is "unexpected pos" to torch.save
        needed = sum(x.nbytes for x in tree_leaves(content) if isinstance(x, torch.Tensor))
        why = "the disk is full" if "unexpected pos" in str(error) else reason(error)
        raise Fault(f"could not write {path} ({why}); it needs {needed:,} bytes; free some space and resume") from None


def read(path):
    """The content of a checkpoint file, its tensors mapped from the disk; Fault if it is damaged. Only plain types are
    unpickled."""
    try:
        if not Path(path).is_file():                    # a pipe would be waited for
            raise ValueError("no regular file")
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type for part in archive.infolist()):
                raise ValueError("compressed")          # torch compresses nothing, a bomb is
            damaged = archive.testzip()                 # torch.load does not notice a flipped bit
        if damaged:
            raise ValueError(f"damaged at {damaged}")
        content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:                          # zipfile, zlib and the unpickler raise a dozen kinds
        raise Fault(f"{path} is not a sound checkpoint ({reason(error)})") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise UserError(f"{path} is a checkpoint of format {found}, and this code reads format {FORMAT}; train again")
    return content


def read_network(path):
    """The content of a checkpoint, or of an export in a folder; Fault unless all fields and weights are sound."""
    content = read_export(path) if path.is_dir() else read(path)
    of_adapters = dict(lora_rank=(int, 1, 1e6), lora_alpha=float, init_from=str) if "base" in content else {}
    of_run = {**USUAL, **MEASURED, "base": str, "model": dict, "optimizer": dict, "wandb_id": str, "world_size": int}
    try:
        of_run = {name: rule for name, rule in of_run.items() if content.get(name) is not None}
        check_fields(path, content, step=(int, 0, 1e12), config=dict, data=dict, ema=dict, **of_run)
        check_fields(f"{path}, config", content["config"], **typing.get_type_hints(ModelConfig), **of_adapters)
        data = content["data"]
        of_data = dict(vocab_size=(int, 2, 2**16), tokenizer=dict, align=(float, 0, 1), **dict.fromkeys(LABELS, str))
        check_fields(f"{path}, data", {"align": 0, **data}, **of_data)                  # older ones have no align
        if "base" in data:
            check_fields(f"{path}, data, base", data["base"], label=str, licence=str, steps=int)
        model_config(content).check()
        check_weights(content)
    except (UserError, TypeError, ValueError, AttributeError) as error:
        raise Fault(f"{path} is not a sound network ({reason(error)})") from None
    data.update({name: printable(data[name]) for name in LABELS})
    return content


def check_weights(content):
    """Raise ValueError unless the weights in a network's content, of adapters theirs, are finite numbers of the shapes
    that its settings ask for."""
    with torch.device("meta"):
        model = SunFish(model_config(content), content["data"]["vocab_size"])
        if "base" in content:
            add_lora(model, content["config"]["lora_rank"], content["config"]["lora_alpha"])
    wanted = {name: x for name, x in model.state_dict().items() if "base" not in content or ".lora_" in name}
    for state in [content[name] for name in ("ema", "model") if name in content]:
        for name in {**wanted, **state}:
            shape, found = (tuple(x[name].shape) if name in x else "nothing" for x in (wanted, state))
            if shape != found:
                raise ValueError(f"{name} is {found}, and should be {shape}")
            if not state[name].isfinite().all():
                raise ValueError(f"{name} is not finite")


def find(place, may_fetch=True):
    """(path, content) of a file, of an export in a folder or on the hub (hf:user/name; not asked unless may_fetch), or
    of the newest sound checkpoint in a folder, else in the folder below it that was written last; None if there is
    none. A damaged file is passed over with a warning; Fault if all are."""
    place = Path(download(place[3:], *EXPORT, may_fetch=may_fetch) if str(place).startswith("hf:") else place)
    if (place / "model.safetensors").exists() or place.is_file():
        return place, read_network(place)
    here = place
    if not any(place.glob(CKPT)):
        here = max(place.glob(f"*/{CKPT}"), key=lambda path: path.lstat().st_mtime, default=place / CKPT).parent
    paths = sorted(here.glob(CKPT), reverse=True)
    for path in paths:
        try:
            return path, read_network(path)
        except Fault as error:
            print(f"warning: {error}", file=sys.stderr)
    if paths:
        raise Fault(f"no sound checkpoint in {place}; train again, or name another")
    return None


def save(cfg, done, state, **content):
    """Write out_dir/ckpt_STEP.pt after `done` steps, and delete old ones."""
    path = Path(cfg.out_dir) / f"ckpt_{done:08d}.pt"
    write(path, dict(config=dataclasses.asdict(cfg), step=done, world_size=world_size(), **state, **content))
    for old in sorted(path.parent.glob(CKPT))[:-cfg.keep_last]:
        if not cfg.keep_interval or int(old.stem[5:]) % cfg.keep_interval:
            old.unlink()


def check_resumable(cfg, data, content):
    """Raise UserError for another network or other data than the checkpoint's, and without cfg.resume for any other
    setting; print what else differs."""
    check_fields(f"the checkpoint in {cfg.out_dir}", content, model=dict, optimizer=dict, world_size=int)
    fixed = {*ModelConfig.__dataclass_fields__, "seed", "batch_tokens", "lora_rank", "lora_alpha"}
    old = {field.name: content["config"].get(field.name, field.default) for field in dataclasses.fields(cfg)}
    free = {"resume"} if cfg.batch_size else {"resume", "batch_size"}                   # 0 is what fits
    changed = [name for name in old if name not in free and old[name] != getattr(cfg, name)]
    wrong = [f"{name}={getattr(cfg, name)} ({old[name]})" for name in changed if name in fixed]
    if wrong:
        raise UserError(f"{', '.join(wrong)}: in brackets what the run in {cfg.out_dir} has; resume with that, or "
                        "choose another --out_dir")
    theirs = content["data"]
    if data["fingerprint"] != theirs["fingerprint"]:
        raise UserError(f"the data is {data['label']} ({data['fingerprint']}), but the checkpoint in {cfg.out_dir} was "
                        f"trained on {theirs['label']} ({theirs['fingerprint']}); resume with that --dataset")
    changes = [f"{name}={getattr(cfg, name)}, was {old[name]}" for name in changed]
    if changes and not cfg.resume:
        raise UserError(f"{cfg.out_dir} already holds a run, with {changes[0]}; continue it with --resume, or choose "
                        "another --out_dir")
    for change in changes:
        print(f"resuming with {change}")
    if content["world_size"] != world_size():
        print(f"resuming on {world_size()} processes, was {content['world_size']}: the same batches and noise")


def check_base(cfg, content, adapts):
    """Raise UserError if the adapters of a checkpoint are for another network than those that are trained now."""
    if content and content.get("base") != adapts.get("base"):
        raise UserError(f"the adapter in {cfg.out_dir} was trained on the network {content.get('base')}, and "
                        f"init_from={cfg.init_from} is {adapts.get('base')}")


# ---- the state of a run ----

def gather_state(model, ema, optimizer):
    """Weights (only of adapters, if there are any), averages and moments as plain tensors on the CPU of the first
    process, and nothing on the others."""
    options, state = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True), {}
    for name, net in (("model", model), ("ema", ema)):
        weights = dcp.get_model_state_dict(net, options=options)
        state[name] = {key: x for key, x in weights.items() if ".lora_" in key} or weights
    return dict(state, optimizer=dcp.get_optimizer_state_dict(model, optimizer, options=options))


def restore_state(state, model, ema, optimizer=None):
    """The inverse of gather_state: the first process has the state, the others nothing. Without an optimizer only the
    weights are restored. Fault for the moments of another network."""
    options = dcp.StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized())
    for net, name in ((model, "model"), (ema, "ema")):
        dcp.set_model_state_dict(net, dict(state.get(name, {})), options=options)      # a copy: it is changed
    if optimizer:                                       # it keeps its tensors: they must not stay mapped from a file
        moments = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, state.get("optimizer", {}))
        try:
            dcp.set_optimizer_state_dict(model, optimizer, moments, options=options)
        except Exception as error:                      # it raises what comes first
            raise Fault(f"the state of the optimizer is not one of this network ({reason(error)}); resume from an "
                        "older checkpoint") from None


# ---- networks ----

def model_config(content):
    """The settings of the network in a checkpoint's content."""
    names = ModelConfig.__dataclass_fields__
    return ModelConfig(**{name: value for name, value in content["config"].items() if name in names})


def fingerprint(state):
    """A hash of a network's weights, which its adapters carry."""
    digest = hashlib.blake2b(digest_size=16)
    for name, x in sorted(state.items()):
        digest.update(name.encode())
        digest.update(x.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def find_network(place):
    """As `find`, with adapters merged into the network that they were trained on; UserError if there is none."""
    found = find(place)
    if found is None:
        runs = sorted({str(path.parent) for path in Path("out").glob(f"*/{CKPT}")})
        raise UserError(f"no checkpoint at {place}; train one with `python train.py config/tiny.py`, or name it with "
                        f"--checkpoint{'; there are ' * bool(runs)}{' '.join(runs)}")
    path, content = found
    return path, merge(content, path) if "base" in content else content


def merge(adapter, path):
    """The content of a checkpoint of adapters with the network that they make; UserError if theirs is not there."""
    config = adapter["config"]
    base = find(config["init_from"], may_fetch=False)       # an adapter of a stranger must not ask the hub
    if base is None:
        raise UserError(f"{path} holds adapters for init_from={config['init_from']}, where there is no network; "
                        "put it back")
    weights = base[1]["ema"]
    if adapter["base"] != fingerprint(weights):
        raise UserError(f"{path}: the adapter was trained on the network {adapter['base']}, and "
                        f"init_from={config['init_from']} is now {fingerprint(weights)}; put that one back")
    model = SunFish(model_config(adapter), adapter["data"]["vocab_size"])
    add_lora(model, config["lora_rank"], config["lora_alpha"])
    model.load_state_dict({**weights, **adapter["ema"]})
    merge_lora(model)
    return {**adapter, "ema": model.state_dict()}


def load_model(content, device="cpu", dtype=torch.float32, int8=False):
    """The averaged network of a checkpoint's content, ready to write."""
    model = SunFish(model_config(content), content["data"]["vocab_size"])
    model.load_state_dict(content["ema"])
    return to_inference(model, device, dtype, int8)


def to_inference(model, device="cpu", dtype=torch.float32, int8=False):
    """The network itself, ready to write: the weights of its matrix products in dtype, or in int8."""
    model.requires_grad_(False)
    if int8:
        quantize(model, dtype)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.to(dtype)
    model.dtype = dtype
    return model.to(device).eval()


# ---- sharing ----

def usual(content):
    """The settings with which a network is to write, where its content has them."""
    return {name: content[name] for name in USUAL if content.get(name) is not None}


def read_tensors(path):
    """The tensors of a safetensors file, copied when they are asked for: name -> function. ValueError if it is none."""
    size, kinds = Path(path).stat().st_size, {kind: dtype for dtype, kind in KINDS.items()}
    if not Path(path).is_file():                        # a pipe would be waited for
        raise ValueError(f"{path} is no regular file")
    data = torch.from_file(str(path), size=size, dtype=torch.uint8)
    start = 8 + int.from_bytes(bytes(data[:8].tolist()), "little")
    if not 8 < start <= min(size, 2**26):
        raise ValueError("its header is cut short")
    header = parse_json(bytes(data[8:start].numpy()))
    rows = {name: row for name, row in header.items() if name != "__metadata__"}
    if sum(row["data_offsets"][1] - row["data_offsets"][0] for row in rows.values()) > size - start:
        raise ValueError("its tensors overlap")         # many small entries could fill the memory

    def tensor(dtype, shape, data_offsets):
        begin, end = data_offsets
        if not 0 <= begin <= end <= size - start:
            raise ValueError("it is cut short")
        return data[start + begin:start + end].clone().view(kinds[dtype]).view(shape)
    return {name: partial(tensor, **row) for name, row in rows.items()}


def write_tensors(path, tensors):
    """Write tensors, by name, as a safetensors file."""
    header, end = {}, 0
    for name, x in tensors.items():
        header[name] = dict(dtype=KINDS[x.dtype], shape=list(x.shape), data_offsets=[end, end := end + x.nbytes])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for x in tensors.values():
            file.write(x.contiguous().view(-1).view(torch.uint8).numpy())


def export(folder, content, **more):
    """Write the averaged network of a checkpoint's content to a new folder, with `more` plain values in config.json;
    Fault if it cannot be written."""
    data = {key: value for key, value in content["data"].items() if key != "tokenizer"}
    config = dict(model_type="sunfish", format=FORMAT, step=content["step"], fingerprint=fingerprint(content["ema"]),
                  config=dataclasses.asdict(model_config(content)), data=data, **more)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / EXPORT[0], content["ema"])
        for name, values in (("tokenizer", content["data"]["tokenizer"]), ("config", config)):
            text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
            (folder / f"{name}.json").write_text(text, encoding="utf-8")
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)                       # it was new, or empty
        raise Fault(f"cannot write export={folder} ({reason(error)}); choose another folder") from None


def read_export(folder):
    """What `export` wrote, as the content of a checkpoint; Fault if it is damaged. Its fingerprint is no protection
    against malice."""
    try:
        config, tokenizer = (parse_json(read_file(folder / name, 2**26)) for name in EXPORT[1:])
        config["data"]["tokenizer"] = tokenizer
        content = {**config, "ema": {name: read() for name, read in read_tensors(folder / EXPORT[0]).items()}}
    except Exception as error:                          # of json, of files, of tensors
        raise Fault(f"{folder} is not a sound export ({reason(error)})") from None
    if content.get("format") != FORMAT or content.get("fingerprint") != fingerprint(content["ema"]):
        raise Fault(f"{folder} is not a sound export of format {FORMAT}: its weights are not those of config.json")
    return content


def download(name, *files, may_fetch=True):
    """A folder with these files of user/name on the Hugging Face hub, fetched once; unless may_fetch, or without the
    hub, what was fetched before. Fault if there is nothing."""
    from huggingface_hub import HfApi, snapshot_download
    why = None if may_fetch else f"not there yet; fetch it with --checkpoint=hf:{name}, if you trust it"
    try:
        if may_fetch:
            HfApi().model_info(name, timeout=5)         # the download itself would try for half a minute
    except Exception as error:                          # whatever the hub and the libraries below it raise
        why = reason(error)
    try:
        return snapshot_download(name, allow_patterns=list(files), local_files_only=bool(why))
    except Exception as error:
        raise Fault(f"cannot fetch {name} ({why or reason(error)}); check the name, the network and HF_TOKEN") from None


def gpt2_vectors(path, vocab_size):
    """GPT-2's token vectors (vocab_size, GPT2_DIM), to unit variance, out of a safetensors file; without a path, of the
    public checkpoint, fetched once. UserError if they cannot be had or are for another vocabulary."""
    try:
        path = path or Path(download("openai-community/gpt2", "model.safetensors"), "model.safetensors")
        tables = [read for name, read in read_tensors(path).items() if name.endswith("wte.weight")]
        if not tables:
            raise ValueError("no tensor wte.weight")
        table = tables[0]().float()
    except Exception as error:                          # of the hub, of files, of tensors
        raise UserError(f"GPT-2's vectors ({path or 'of the hub'}): {reason(error)}; name a copy of "
                        "openai-community/gpt2's model.safetensors with --prompt_file") from None
    if table.shape != (vocab_size, GPT2_DIM):
        raise UserError(f"GPT-2's vectors are {tuple(table.shape)}, and this text needs {(vocab_size, GPT2_DIM)}; "
                        "prepare the text with --tokenizer=gpt2, or use --prompt_table=learned")
    return (table / table.std()).half()
