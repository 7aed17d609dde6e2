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


def asked_as_chats(rows, decoders: list, chat: bool | None = None) -> list[str]:
    """The names of the decoders that are asked prompts which are texts as chats: of those that have
    a template (chat None), of all (True), of none (False). Prompts that are chats stay as they are.

    Raises:
        ValueError: for a decoder without a template where chats are asked for, or are the prompts
            and it has a tokenizer; for prompts that are chats with chat=False.
    """
    bare = [decoder for decoder in decoders if not takes_chat(decoder)]
    if chat and bare:
        raise ValueError(
            f"--chat: decoder {bare[0].name!r} has no chat template; leave it out, and each decoder "
            "that has one gets chats"
        )
    if not isinstance(rows[0]["prompt"], str):
        # one without a tokenizer, of the user's own, reads prompts as it likes
        bare = [decoder.name for decoder in bare if tokenizer_of(decoder) is not None]
        if bare or chat is False:
            why = f"decoder {bare[0]!r} has no chat template" if bare else "--no-chat"
            first = shorten(repr(rows[0]["prompt"]), 60)
            raise ValueError(f"{why}, and the prompts are chats, {first}: give texts as prompts")
        return []
    return [d.name for d in decoders if d not in bare] if chat is not False else []
