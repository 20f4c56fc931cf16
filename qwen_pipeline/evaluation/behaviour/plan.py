"""The settings of the requests that both models answer."""

from dataclasses import asdict, dataclass
from typing import Any

from qwen_pipeline.errors import InputRefused


@dataclass(frozen=True, slots=True, kw_only=True)
class BehaviourPlan:
    """The length of requests and of answers. Without any length of one kind, that kind is not measured.

    Attributes:
        tokens: Maximum number of tokens of a tool call or of JSON; 0 for none of these requests.
        thinking_tokens: Maximum number of tokens of a thought with the answer; 0 for no such request.
        needles: Numbers of tokens of held-out text in which one sentence has to be found.
    """

    tokens: int = 64
    thinking_tokens: int = 256
    needles: tuple[int, ...] = (1024,)

    def __post_init__(self) -> None:
        for name, value in (("tokens", self.tokens), ("thinking_tokens", self.thinking_tokens)):
            if not 0 <= value <= 2**20:
                raise InputRefused(f"behaviour.{name} is {value}.", remedy="Set it to a number from 0 to 1,048,576.")
        if unfit := [length for length in self.needles if not 64 <= length <= 2**24]:
            raise InputRefused(
                f"behaviour.needles has the length {unfit[0]}.", remedy="Set lengths of 64 to 16,777,216 tokens."
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"needles": list(self.needles)}


DEFAULT_BEHAVIOUR = BehaviourPlan()
NO_REQUESTS = BehaviourPlan(tokens=0, thinking_tokens=0, needles=())
