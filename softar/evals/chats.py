"""Whether the prompts of a task are put into a model's chat template."""

from ..checks import shorten


def tokenizer_of(decoder):
    """A decoder's; None of the user's own that has none."""
    from ..decoders.soft import SelfConsistency

    inner = decoder.decoder if isinstance(decoder, SelfConsistency) else decoder
    return getattr(inner, "tokenizer", None)


def takes_chat(decoder) -> bool:
    """Does it turn chat messages into a prompt, or the server that it asks?"""
    from ..decoders.openai import OpenAIDecoder

    if isinstance(decoder, OpenAIDecoder):
        return decoder.request.api == "chat"
    tokenizer = tokenizer_of(decoder)
    return tokenizer is not None and tokenizer.chat_template is not None


def with_chat(rows, decoders: list, chat: bool | None = None):
    """The rows, with chat messages for prompts that are texts where all decoders have a template
    (chat None), or where that is asked for (True). Prompts that are chats stay as they are.

    Raises:
        ValueError: for a decoder without a template where chats are asked for, or are the prompts
            and it has a tokenizer; for prompts that are chats with chat=False.
    """
    bare = [decoder for decoder in decoders if not takes_chat(decoder)]
    if chat and bare:
        model = bare[0].columns["model"]
        raise ValueError(f"--chat: model={model!r} has no chat template; leave it out")
    if not isinstance(rows[0]["prompt"], str):
        # one without a tokenizer, of the user's own, reads prompts as it likes
        bare = [decoder.columns["model"] for decoder in bare if tokenizer_of(decoder) is not None]
        if bare or chat is False:
            why = f"model={bare[0]!r} has no chat template" if bare else "--no-chat"
            first = shorten(repr(rows[0]["prompt"]), 60)
            raise ValueError(f"{why}, and the prompts are chats, {first}: give texts as prompts")
        return rows
    is_asked = not bare if chat is None else chat
    if not is_asked:
        return rows
    from datasets import Dataset

    return Dataset.from_list(
        [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    )
