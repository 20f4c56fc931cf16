"""Proofs about pointers to releases: each leads where the last statement in the log says, and a known key signed it."""

from collections.abc import Iterator, Sequence

from qwen_pipeline.checkpoint.store.canonical import MANIFEST_FILE
from qwen_pipeline.checkpoint.store.log import LOG
from qwen_pipeline.checkpoint.store.products import product as product_of
from qwen_pipeline.errors import listed
from qwen_pipeline.lineage.log_proof import StoreLog
from qwen_pipeline.lineage.pointers import History, pointed, products
from qwen_pipeline.lineage.statements import RELEASES, Statement, has_signed, statements
from qwen_pipeline.lineage.verification.envelopes import PublicKey
from qwen_pipeline.lineage.verification.findings import Finding

LOGGED, SIGNED = "pointers_are_logged", "statements_are_signed"


def prove_pointers(log: StoreLog, fine_tune: str, keys: Sequence[PublicKey] = ()) -> list[Finding]:
    """Return whether the pointers of a fine-tune's products are those of the log; nothing if it has none.

    Args:
        log: The log of the store.
        fine_tune: Its name.
        keys: Keys of which one must have signed each statement that is in force.
    """
    stated = statements(log.entries)
    known = {*products(log.store), *(statement.product for statement in stated)}
    histories = [
        History(store=log.store, product=product, statements=[each for each in stated if each.product == product])
        for product in sorted(known)
        if product_of(product).fine_tune == fine_tune
    ]
    if log.fault or not histories:
        return []
    faults = [fault for history in histories for fault in _faults(history)]
    count = sum(len(_pointers(history)) for history in histories)
    if faults:
        return [Finding(name=LOGGED, verdict="refuted", detail=f"{listed(faults)}.")]
    logged = Finding(name=LOGGED, verdict="proven", detail=f"{count} pointers lead where {LOG} says.")
    return [logged, _signed(log, [each for history in histories for each in _in_force(history)], keys)]


def _pointers(history: History) -> list[str]:
    """Return the names of a product's pointers: those of the log, and every link in its folder."""
    folder = history.store / RELEASES / history.product
    links = {path.name for path in folder.glob("[!.]*")}
    return sorted(links | {each.pointer for each in history.statements if each.pointer})


def _faults(history: History) -> Iterator[str]:
    yield from (each.fault for each in history.statements if each.fault)
    sound = History(
        store=history.store,
        product=history.product,
        statements=[each for each in history.statements if not each.fault],
    )
    for pointer in _pointers(history):
        name, last = f"{RELEASES}/{history.product}/{pointer}", sound.last_move(pointer)
        link = pointed(history.store, history.product, pointer)
        if not last:
            yield f"{name} leads to {link or 'nothing'}, and no line of {LOG} says so"
        elif link != last.release:
            yield (
                f"{name} leads to {link or 'nothing'}, the last statement (line {last.line}, {last.time}, {last.by})"
                f" to {last.release}"
            )
        elif not (history.store / link / MANIFEST_FILE).is_file():
            yield f"{name} leads to {link}, which is gone"


def _in_force(history: History) -> list[Statement]:
    """Return the statements that say where the pointers lead, and the last ones about these releases."""
    moves = [move for pointer in _pointers(history) if (move := history.last_move(pointer))]
    verdicts = [verdict for move in moves if (verdict := history.verdict(history.store / move.release))]
    return [*moves, *verdicts]


def _signed(log: StoreLog, stated: Sequence[Statement], keys: Sequence[PublicKey]) -> Finding:
    lines = {each.line: each for each in stated}
    if not keys:
        named = sum(bool(each.keyid) for each in lines.values())
        detail = f"{named} of {len(lines)} statements in force name a key; none was given."
        return Finding(name=SIGNED, verdict="claimed", detail=detail)
    unsigned = [each for line, each in lines.items() if not has_signed(log.entries[line - 1], keys)]
    if unsigned:
        named = [f"{each.event} {each.pointer or each.release} of {each.product}" for each in unsigned]
        by = ", ".join(key.name or key.keyid[:16] for key in keys)
        detail = f"No key of {by} signed lines {', '.join(str(each.line) for each in unsigned)}: {listed(named)}."
        return Finding(name=SIGNED, verdict="refuted", detail=detail)
    return Finding(name=SIGNED, verdict="attested", detail=f"{len(lines)} statements in force are signed.")
