"""An output as a row of blocks, whole and in pieces."""

from __future__ import annotations

from octavo.server.openai.blocks import Blocks
from octavo.server.openai.schema import ChatBody
from octavo.structured.chat_output import output_parser
from octavo.text.generation import Delta

BODY = ChatBody(model="m", messages=[])
SAID = (
    "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>analysis<|message|>so<|end|>"
    "<|start|>assistant<|channel|>commentary<|message|>Let me see.<|end|>"
    "<|start|>assistant<|channel|>analysis<|message|>\nthen<|end|><|start|>assistant<|channel|>final<|message|>2"
)
ROW = [("reasoning", "hm\nso"), ("text", "Let me see."), ("reasoning", "\nthen"), ("text", "2")]


def blocks() -> Blocks:
    return Blocks(output_parser(None, "openai_gptoss", {}, ""), BODY)


def test_reasoning_goes_on_in_a_block_of_its_own() -> None:
    """What parts messages of reasoning stands between blocks, not within them."""
    whole = blocks()
    whole.read(SAID)
    assert [(block.kind, block.text) for block in whole.row] == ROW
    message = whole.as_message()
    assert (message.reasoning, message.content) == ("hm\nso\n\nthen", "Let me see.2")
    for at in range(1, len(SAID)):
        pieces = blocks()
        pieces.push(Delta(SAID[:at], []))
        pieces.push(Delta(SAID[at:], [], finish_reason="stop"))
        assert [(block.kind, block.text) for block in pieces.row] == ROW
