"""``qwen-pipeline sign`` and ``verify``: signatures of releases, and their verification."""

from pathlib import Path
from typing import Annotated

import typer

from qwen_pipeline.cli.lineage.audit import Identity, Issuer, Keys, PolicyFile
from qwen_pipeline.cli.results import CommandResult, command
from qwen_pipeline.errors import CheckFailed, InputRefused

app = typer.Typer()


@command(
    app,
    "sign",
    examples=["qwen-pipeline sign my-lora", "qwen-pipeline sign releases/my-lora --key release.pem --json"],
)
def sign(
    release: str,
    key: Annotated[
        Path | None, typer.Option(help="P-256 private key (PEM); default: signing.key in the settings.")
    ] = None,
    certificate: Annotated[
        Path | None,
        typer.Option(help="Certificate of the key and intermediate ones (PEM); default: of [signing]."),
    ] = None,
    keyless: Annotated[
        bool, typer.Option("--keyless", help="Sign with Sigstore as this machine's account; needs the network.")
    ] = False,
) -> CommandResult:
    """Sign RELEASE, a published directory or the name of a fine-tune: BOM, SLSA provenance and model.sig join it.

    Every byte is compared with the manifest first. A signature of another key is replaced. The passphrase of an
    encrypted key is read from QWEN_PIPELINE_KEY_PASSPHRASE; the token for --keyless is that of the CI, or in
    SIGSTORE_ID_TOKEN.
    """
    from contextlib import nullcontext

    from qwen_pipeline.audits import output_of
    from qwen_pipeline.checkpoint.store.canonical import ATTESTATIONS
    from qwen_pipeline.config import load_settings
    from qwen_pipeline.lineage.keyless import keyless as keyless_key
    from qwen_pipeline.lineage.sign import load_key, sign_release

    settings = load_settings()
    if keyless and (key or certificate):
        raise InputRefused("--keyless signs without a key of yours.", remedy="Pass --keyless alone, or --key.")
    root, file = output_of(release, settings), key or settings.signing.key
    if not (keyless or file):
        raise InputRefused("No key was given.", remedy='Pass --key, or set key = "release.pem" in [signing].')
    chain = certificate or (None if key else settings.signing.certificate)
    with keyless_key() if keyless or not file else nullcontext(load_key(file, chain)) as signer:
        signed = sign_release(root, signer)
    done = f"Signed: {', '.join(ATTESTATIONS)} in {root}." if signed else f"{root} has this key's signature already."
    return CommandResult(
        data={"release": str(root), "keyid": signer.keyid, "signed": signed, "files": list(ATTESTATIONS)},
        view=[done],
    )


@command(
    app,
    "verify",
    examples=["qwen-pipeline verify release/ --key release.pub", "qwen-pipeline verify release/ --policy policy.toml"],
)
def verify(
    release: Path,
    keys: Keys = None,
    policy: PolicyFile = None,
    identity: Identity = None,
    issuer: Issuer = None,
) -> CommandResult:
    """Verify RELEASE, a published directory, where it is served: signature, every byte, order of stages, policy.

    The command qwen-pipeline-verify does the same, and needs neither Dagster nor torch.
    """
    from qwen_pipeline.cli.console import size
    from qwen_pipeline.cli.lineage.views import finding_table
    from qwen_pipeline.lineage.verification.findings import in_one_line
    from qwen_pipeline.lineage.verification.policy import load_policy
    from qwen_pipeline.lineage.verification.trust import given_signers
    from qwen_pipeline.lineage.verification.verify import verify as verify_release

    found = verify_release(
        release,
        keys=given_signers(keys or (), identity, issuer),
        policy=load_policy(policy) if policy else None,
    )
    words = "is not verified" if found.faults else "is verified"
    return CommandResult(
        data=found.to_json(),
        view=[finding_table(found.findings), f"{release} {words}: {found.files} files, {size(found.nbytes)}."],
        fault=_fault(release, [in_one_line(f"{each.name}: {each.detail}") for each in found.faults]),
    )


def _fault(release: Path, faults: list[str]) -> CheckFailed | None:
    if not faults:
        return None
    more = f" And {len(faults) - 1} more." if faults[1:] else ""
    remedy = "Do not serve it; fetch the release again."
    if faults[0].startswith("policy."):
        remedy = "Do not serve it: its files are those that were released, and the policy demands more of a release."
    elif all(fault.startswith("signature: ") for fault in faults):
        remedy = "Do not serve it; fetch it again with its signature, or pass the key of its signer."
    return CheckFailed(f"{release} is refused: {faults[0]}{more}", remedy=remedy)
