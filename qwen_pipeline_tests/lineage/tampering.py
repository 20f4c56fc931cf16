"""Changes to a store: each is one that an audit has to find, or a harmless one that it must not complain about."""

import base64
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import strategies as st

from qwen_pipeline.checkpoint.manifest import FileDigest, dump_manifest, open_manifest
from qwen_pipeline.checkpoint.safetensors_file import open_safetensors
from qwen_pipeline.checkpoint.store import log
from qwen_pipeline.checkpoint.store.canonical import ATTESTATIONS, SIGNATURE
from qwen_pipeline.checkpoint.store.destinations import CheckpointStore
from qwen_pipeline.lineage.pointers import judge, link_of, move
from qwen_pipeline.lineage.sign import load_key, sign_release
from qwen_pipeline.lineage.statements import recall
from qwen_pipeline.lineage.verification.trust import Authority, Signer
from qwen_pipeline_tests.lineage.chained import NAME, Chained, publish_again, write_key
from qwen_pipeline_tests.lineage.verification.certified import Party

# No digest covers the signature itself, so white space after it is no change; every other file is covered to its end.
STAGES = ("padded", "quantized", "validated", "published")


@dataclass(frozen=True)
class Tampered:
    """A change that was made to a store, and a word that the audit must name.

    Attributes:
        signers: Who is trusted, if it is not the key of the chain.
    """

    change: str
    named: str
    signers: Sequence[Signer] = ()


def flip_bit(chained: Chained, draw: st.DrawFn) -> Tampered:
    path = draw(st.sampled_from([*files(chained), chained.store / log.LOG, chained.store / log.HEAD]))
    data = bytearray(path.read_bytes())
    place = draw(st.integers(0, len(data) * 8 - 1))
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)
    return Tampered(f"bit {place} of {path}", path.name)


def swap_files(chained: Chained, draw: st.DrawFn) -> Tampered:
    """Put a file of one stage in the place of another, as with shards of two models.

    In the place of a manifest it leaves nothing that could name other files.
    """
    one = draw(st.sampled_from(files(chained)))
    unlike = [path for path in files(chained) if path.read_bytes() != one.read_bytes()]
    other = draw(st.sampled_from([path for path in unlike if path.suffix == one.suffix] or unlike))
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    names = (one.name, other.name)
    return Tampered(f"{one} and {other} swapped", "manifest.json" if "manifest.json" in names else one.name)


def remove_file(chained: Chained, draw: st.DrawFn) -> Tampered:
    path = draw(st.sampled_from([path for path in files(chained) if path.name != "manifest.json"]))
    path.unlink()
    return Tampered(f"{path} removed", path.name)


def add_file(chained: Chained, draw: st.DrawFn) -> Tampered:
    """Add a file that no manifest lists, or a link to a directory elsewhere."""
    name = draw(st.sampled_from(["modeling_qwen2.py", ".hidden", "config.json~", "logs/more.log", "a/b/c.safetensors"]))
    path = chained.output(draw(st.sampled_from(STAGES))) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_link := draw(st.booleans()):
        path.symlink_to(chained.root / "merged")
    else:
        path.write_text("import os\n")
    return Tampered(f"{path} added, a link: {is_link}", path.name)


def truncate_file(chained: Chained, draw: st.DrawFn) -> Tampered:
    path = draw(st.sampled_from(files(chained)))
    size = draw(st.integers(0, path.stat().st_size - (2 if path.name == SIGNATURE else 1)))
    os.truncate(path, size)
    return Tampered(f"{path} cut to {size} bytes", path.name)


def append_to_file(chained: Chained, draw: st.DrawFn) -> Tampered:
    path = draw(st.sampled_from(files(chained)))
    with path.open("ab") as file:
        file.write(draw(st.sampled_from([b"\0", b"{}"] if path.name == SIGNATURE else [b"\0", b"{}", b" ", b"\n"])))
    return Tampered(f"a byte appended to {path}", path.name)


def link_file(chained: Chained, draw: st.DrawFn) -> Tampered:
    """Put a link in the place of a file: to the same bytes elsewhere, to others, to a directory or to nothing."""
    path = draw(st.sampled_from([path for path in files(chained) if path.name != "manifest.json"]))
    elsewhere = chained.root / "elsewhere"
    match kind := draw(st.sampled_from(["same", "other", "directory", "nothing"])):
        case "same":
            shutil.copyfile(path, elsewhere)
        case "other":
            elsewhere.write_bytes(path.read_bytes() + b" ")
        case "directory":
            elsewhere.mkdir()
        case _:
            pass
    path.unlink()
    path.symlink_to(elsewhere)
    return Tampered(f"{path} is a link to {kind}", path.name)


def link_output(chained: Chained, draw: st.DrawFn) -> Tampered:
    """Put a link in the place of an output, to a copy whose manifest states what no digest covers."""
    root = chained.output(draw(st.sampled_from(STAGES)))
    elsewhere = chained.root / "elsewhere" / "output"
    shutil.copytree(root, elsewhere)
    shutil.rmtree(root)
    root.symlink_to(elsewhere)
    manifest = json.loads((root / "manifest.json").read_bytes())
    manifest["run"]["seconds"] += 1
    (elsewhere / "manifest.json").write_text(json.dumps(manifest))
    return Tampered(f"{root} is a link", "manifest.json")


def swap_tensors(chained: Chained, draw: st.DrawFn) -> Tampered:
    """Exchange the bytes of two tensors of one shard, or their names in its header."""
    shards = [path for path in files(chained) if path.suffix == ".safetensors"]
    path = draw(st.sampled_from(shards))
    opened, data = open_safetensors(path), bytearray(path.read_bytes())
    spans = {name: (opened.offsets[name], spec.nbytes) for name, spec in opened.specs.items()}
    pairs = [
        (one, other)
        for one, (at, size) in spans.items()
        for other, (to, length) in spans.items()
        if one < other and size == length and data[at : at + size] != data[to : to + size]
    ]
    one, other = draw(st.sampled_from(pairs))
    if by_name := draw(st.booleans()):
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        header[one], header[other] = header[other], header[one]
        written = json.dumps(header, separators=(",", ":")).encode().ljust(length)
        data[8 : 8 + length] = written[:length]
    else:
        (at, size), (to, _) = spans[one], spans[other]
        data[at : at + size], data[to : to + size] = data[to : to + size], data[at : at + size]
    path.write_bytes(data)
    return Tampered(f"{one} and {other} of {path} swapped, by name: {by_name}", path.name)


def reseal(chained: Chained, draw: st.DrawFn) -> Tampered:
    """Change a file, and make the manifest of its stage agree with it."""
    root = chained.output(draw(st.sampled_from(STAGES)))
    manifest = open_manifest(root)
    hashed = {path: file for path, file in manifest.contents.files.items() if isinstance(file, FileDigest)}
    name = draw(st.sampled_from(sorted(path for path in hashed if not path.endswith(".safetensors"))))
    data = (root / name).read_bytes() + b" "
    (root / name).write_bytes(data)
    changed = {name: FileDigest(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())}
    contents = replace(manifest.contents, files={**manifest.contents.files, **changed})
    sealed = replace(manifest, contents=contents, content_digest=contents.digest)
    (root / "manifest.json").write_bytes(dump_manifest(sealed))
    if draw(st.booleans()):  # and the whole log, as the tools would have written it
        rewrite_log(chained)
        return Tampered(f"{name} of {root} and the log resealed", "log_is_that_of_signing")
    return Tampered(f"{name} of {root} resealed", "manifest.json")


def rewrite_log(chained: Chained) -> None:
    for name in (log.LOG, log.HEAD):
        (chained.store / name).unlink()
    for stage in STAGES:
        log.record(chained.store, chained.output(stage), "finished")


def edit_manifest(chained: Chained, draw: st.DrawFn) -> Tampered:
    """Change one value of a manifest, and leave it valid."""
    path = chained.output(draw(st.sampled_from(STAGES))) / "manifest.json"
    manifest = json.loads(path.read_bytes())
    change = draw(st.sampled_from(["inputs", "spec", "code_version", "result", "run", "content_digest"]))
    match change:
        case "inputs":
            role = draw(st.sampled_from(sorted(manifest["derivation"]["inputs"])))
            manifest["derivation"]["inputs"][role] = "sha256:" + "0" * 64
        case "spec":
            manifest["derivation"]["spec"]["added"] = 1
        case "code_version":
            manifest["derivation"]["code_version"] += "0"
        case "result":
            manifest["result"]["added"] = 1
        case "run":
            manifest["run"]["seconds"] += 1
        case _:
            manifest["content_digest"] = "sha256:" + "0" * 64
    path.write_text(json.dumps(manifest))
    return Tampered(f"{change} of {path}", "manifest.json" if change in ("result", "run") else "")


def edit_report(chained: Chained, draw: st.DrawFn) -> Tampered:
    path = chained.output("validated") / "report.json"
    report = json.loads(path.read_bytes())
    check = draw(st.sampled_from(report["checks"]))
    check["passed"] = not check["passed"]
    path.write_text(json.dumps(report))
    return Tampered(f"{check['name']} of {path}", "report.json")


def replace_config(chained: Chained, draw: st.DrawFn) -> Tampered:
    """Change one value of a config, and leave it valid."""
    path = chained.output(draw(st.sampled_from(("padded", "quantized", "published")))) / "config.json"
    config = json.loads(path.read_bytes())
    name = draw(st.sampled_from(sorted(config)))
    config[name] = draw(st.sampled_from([each for each in (0, 1, "", None) if each != config[name]]))
    path.write_text(json.dumps(config))
    return Tampered(f"{name} of {path}", path.name)


def edit_log(chained: Chained, draw: st.DrawFn) -> Tampered:
    """Remove, repeat or change any line, or cut off the end."""
    path = chained.store / log.LOG
    lines = path.read_bytes().splitlines(keepends=True)
    place = draw(st.integers(0, len(lines) - 1))
    changed = json.loads(lines[place]) | {"time": "2020-01-01T00:00:00+00:00"}
    match change := draw(st.sampled_from(["remove", "repeat", "change", "cut"])):
        case "remove":
            del lines[place]
        case "repeat":
            lines.insert(place, lines[place])
        case "change":
            lines[place] = json.dumps(changed, ensure_ascii=False).encode() + b"\n"
        case _:
            del lines[place:]
    path.write_bytes(b"".join(lines))
    return Tampered(f"{change} line {place + 1} of {path}", log.LOG)


def delete_parent(chained: Chained, draw: st.DrawFn) -> Tampered:
    stage = draw(st.sampled_from(STAGES[:-1]))
    shutil.rmtree(chained.output(stage))
    return Tampered(f"{stage} deleted", f"{stage} is ")


def replay_pointer(chained: Chained, draw: st.DrawFn) -> Tampered:
    """Put a pointer back to where the log does not say it leads, or remove it."""
    key = load_key(chained.key)
    move(chained.store, NAME, "candidate", chained.release, reason="made", key=key)
    link = link_of(chained.store, NAME, "candidate")
    link.unlink()
    if other := draw(st.sampled_from(["", "../../published/bot/0123456789abcdef", str(chained.release)])):
        link.symlink_to(other)
    return Tampered(f"{link} leads to {other or 'nothing'}", "releases/bot/candidate")


def forge_statement(chained: Chained, draw: st.DrawFn) -> Tampered:
    """Approve or revoke a release without a key, in a line that continues the log."""
    move(chained.store, NAME, "candidate", chained.release, reason="made", key=load_key(chained.key))
    approved = draw(st.booleans())
    judge(chained.store, NAME, chained.release, approved=approved, reason="forged")
    return Tampered(f"forged, approved: {approved}", f"{'approved' if approved else 'revoked'} published/bot")


def move_approval(chained: Chained, draw: st.DrawFn) -> Tampered:
    """Give the signed approval of one release to another one, in a line that continues the log."""
    key = load_key(chained.key)
    move(chained.store, NAME, "candidate", chained.release, reason="made", key=key)
    judge(chained.store, NAME, chained.release, approved=True, reason="read", key=key)
    approval = list(log.read_log(chained.store))[-1]
    path = approval.path
    if draw(st.booleans()):
        path = "published/bot/0123456789abcdef"
    elif draw(st.booleans()):  # something in between, so that the copy is no mere repetition
        judge(chained.store, NAME, chained.release, approved=False, reason="withdrawn", key=key)
    else:
        path = f"{path[:-1]}{'0' if path[-1] != '0' else '1'}"
    log.append_statement(chained.store, "approved", path, approval.manifest_sha256, lambda *_: approval.detail)
    return Tampered(f"an approval copied to {path}", "holds a statement")


def take_attestations(chained: Chained, draw: st.DrawFn) -> Tampered:
    """Put the signature, the provenance or the BOM of another release of the same signer in the place of its own."""
    names = draw(st.lists(st.sampled_from(ATTESTATIONS), min_size=1, unique=True))
    for name in names:
        shutil.copyfile(chained.other / name, chained.release / name)
    return Tampered(f"{names} of another release", "signature: ")


def replace_release(chained: Chained, _: st.DrawFn) -> Tampered:
    """Put another release of the same signer, whole and sound, in its place."""
    root = chained.release
    shutil.rmtree(root)
    shutil.copytree(chained.other, root)
    return Tampered("another release in its place", f"its directory is {root.name}")


def swap_certificate(chained: Chained, draw: st.DrawFn) -> Tampered:
    """Have a certified key sign, and then exchange the certificate that the signature holds."""
    authority, stranger = Party("root"), Party("root")
    signer = Party("release", authority, usage="digital_signature")
    place = chained.root / "signer"
    signer.write(place)
    sign_release(chained.release, load_key(place.with_suffix(".pem"), place.with_suffix(".crt")))
    other = draw(st.sampled_from(["another key", "another authority", "no authority", "an authority"]))
    party = {
        "another key": Party("release", authority, usage="digital_signature"),
        "another authority": Party("release", stranger, usage="digital_signature"),
        "no authority": Party("release", usage="digital_signature"),
        "an authority": authority,
    }[other]
    path = chained.release / "model.sig"
    bundle = json.loads(path.read_bytes())
    der = party.certificate.public_bytes(Encoding.DER)
    bundle["verificationMaterial"]["x509CertificateChain"] = {
        "certificates": [{"rawBytes": base64.b64encode(der).decode()}]
    }
    path.write_text(json.dumps(bundle))
    trusted = Authority(name="acme", certificates=[authority.certificate], subject="")
    return Tampered(f"the certificate of {other}", "model.sig", signers=[trusted])


TAMPERINGS: tuple[Callable[[Chained, st.DrawFn], Tampered], ...] = (
    flip_bit,
    flip_bit,
    swap_files,
    remove_file,
    add_file,
    edit_manifest,
    edit_report,
    replace_config,
    delete_parent,
    edit_log,
    replay_pointer,
    forge_statement,
    truncate_file,
    append_to_file,
    link_file,
    link_output,
    swap_tensors,
    reseal,
    move_approval,
    take_attestations,
    replace_release,
    swap_certificate,
)


def touch(chained: Chained, draw: st.DrawFn) -> None:
    """Give a file another time and other permissions."""
    path = draw(st.sampled_from(files(chained)))
    os.utime(path, (0, 0))
    path.chmod(0o600)


def add_folder(chained: Chained, draw: st.DrawFn) -> None:
    (chained.output(draw(st.sampled_from(STAGES))) / "empty").mkdir()


def add_statements(chained: Chained, draw: st.DrawFn) -> None:
    """Move a pointer and approve or revoke the release, with the key, and recall something else."""
    key = load_key(chained.key)
    move(chained.store, NAME, draw(st.sampled_from(["candidate", "production"])), chained.release, reason="a", key=key)
    judge(chained.store, NAME, chained.release, approved=draw(st.booleans()), reason="b", key=key)
    recall(chained.store, "sha256:" + "1" * 64, reason="no licence", key=key)


def add_release(chained: Chained, draw: st.DrawFn) -> None:
    """Finish another release of the fine-tune, as the stage does."""
    publish_again(chained, CheckpointStore(chained.store).slot(NAME), f"Qwen/{draw(st.integers(0, 9))}")


def sign_again(chained: Chained, _: st.DrawFn) -> None:
    """Sign with another key, and then again with the one that is trusted."""
    write_key(chained.root / "second.pem", chained.root / "second.pub")
    for key in (chained.root / "second.pem", chained.key):
        sign_release(chained.release, load_key(key))


def interrupt(chained: Chained, draw: st.DrawFn) -> None:
    """Leave what a killed stage leaves: an unfinished directory and a lock."""
    root = chained.output(draw(st.sampled_from(STAGES)))
    shutil.copytree(root, root.with_name("fedcba9876543210.partial"))
    root.with_name("fedcba9876543210.lock").touch()


HARMLESS: tuple[Callable[[Chained, st.DrawFn], None], ...] = (
    touch,
    add_folder,
    add_statements,
    add_release,
    sign_again,
    interrupt,
)


def files(chained: Chained) -> list[Path]:
    found = [path for stage in STAGES for path in chained.output(stage).rglob("*") if path.is_file()]
    return sorted(path for path in found if path.stat().st_size)
