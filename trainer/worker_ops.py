"""What a worker child does: one method for each operation, JSON in and JSON out.

Runs in the child only (trainer.worker_child); libraries are imported by the operation that needs them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.refusal import Refusal

TOKENS_SHOWN = 20_000
CHARACTERS_SHOWN = 100_000
CHARACTERS_VIEWED = 2**21
PREVIEW_ROWS = 3
PREVIEW_CHARACTERS = 600


class Operations:
    """The operations and what they keep between calls: the last tokenizer and the last file's row count."""

    def __init__(self, report: Callable[[int, int], None]) -> None:
        self._report = report
        self._reported = 0.0
        self._tokenizer: tuple[object, Any] = (None, None)
        self._rows: tuple[object, int] = (None, 0)
        self._operations: dict[str, Callable[..., Any]] = {
            "warm": self.warm,
            "check_model": self.check_model,
            "check_shapes": self.check_shapes,
            "try_tokenizer": self.try_tokenizer,
            "check_data": self.check_data,
            "repair_data": self.repair_data,
            "preview_columns": self.preview_columns,
            "view_row": self.view_row,
            "preview_profile": self.preview_profile,
            "token_texts": self.token_texts,
            "tokenise": self.tokenise,
            "convert": self.convert,
            "starter": self.starter,
        }

    def run(self, op: str, args: dict[str, Any]) -> Any:
        """Do `op`; raises Refusal for what the data did, KeyError for an operation that does not exist."""
        return self._operations[op](**args)

    def warm(self) -> None:
        """Import what most operations need."""
        import numpy  # noqa: F401
        from transformers import AutoTokenizer  # noqa: F401

        from trainer.data import doctor, tokens  # noqa: F401

    def check_model(
        self, path: str, deep: bool = False, model_roots: Sequence[str] = (), layouts: str | None = None
    ) -> dict[str, Any]:
        """The report on a model folder by its headers; `layouts` is where the layouts of architectures are kept."""
        from trainer.models.inspect import inspect_model

        roots = [Path(root) for root in model_roots]
        return inspect_model(Path(path), deep=deep, model_roots=roots, layouts=Path(layouts) if layouts else None)

    def check_shapes(self, path: str, model_roots: Sequence[str] = (), layouts: str | None = None) -> dict[str, Any]:
        """The shape verdict on a model folder, as in trainer.models.shapes."""
        from trainer.models.shapes import check_shapes, limit_memory

        limit_memory()
        roots = [Path(root) for root in model_roots]
        return check_shapes(Path(path), model_roots=roots, layouts=Path(layouts) if layouts else None)

    def try_tokenizer(self, path: str, rows: int | None, file: str) -> dict[str, Any]:
        """Whether tokenizer and chat template work, as in trainer.models.tokenizer_trial."""
        from trainer.models.tokenizer_trial import try_tokenizer

        return try_tokenizer(Path(path), rows, file)

    def check_data(self, path: str, model_path: str | None = None, **options: Any) -> dict[str, Any]:
        """The doctor's report; with a model, lengths in its tokens. `options` as in trainer.data.doctor."""
        from trainer.data.doctor import check_data

        tokenizer = self._load_tokenizer(model_path) if model_path else None
        return check_data(path, tokenizer=tokenizer, model_path=model_path or "", progress=self._progress, **options)

    def preview_columns(self, path: str, columns: Sequence[str] = (), rows: int = PREVIEW_ROWS) -> dict[str, Any]:
        """The first rows as a column mapping reads them, with the names of the columns and a mapping that fits."""
        from trainer.data.formats import Tally, read_rows

        tally = Tally()
        shown: list[dict[str, Any]] = []
        for row in read_rows(path, tally=tally, columns=columns):
            if len(shown) >= rows:
                break
            turns = row.messages or ([{"role": "text", "content": row.text}] if row.text is not None else [])
            cut = [{"role": turn["role"], "content": turn["content"][:PREVIEW_CHARACTERS]} for turn in turns[:8]]
            shown.append({"line": row.line, "messages": cut, "problem": row.problem.message if row.problem else ""})
        found = tally.format
        return {
            "rows": shown,
            "columns": list(found.columns[:100]) if found else [],
            "suggested": list(found.suggested) if found else [],
            "mapping": found.mapping.texts() if found and found.mapping else [],
        }

    def repair_data(self, path: str, out: str, columns: Sequence[str] = ()) -> dict[str, Any]:
        """Write the repaired copy of a data file to `out`, and what was left out beside it; see trainer.data.repair."""
        from trainer.data.repair import repair

        target = Path(out)
        rejects = target.with_name(f"{target.stem}-rejects.jsonl")
        return repair(path, target, rejects, columns=columns, progress=self._progress) | {"rejects": str(rejects)}

    def view_row(
        self,
        path: str,
        row: int,
        model_path: str,
        profile: str | None,
        system_prompt: str,
        date: str,
        max_length: int,
        too_long: str,
        profiles_root: str | None = None,
        piece: int | None = None,
        chat_template: str = "model",
        columns: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Row `row` (from 0) as training will see it: messages before and after the profile, and tokens by kind.

        A plain text stands as one message of the role "text"; `piece` chooses one of its pieces, None: its beginning.
        """
        from trainer.data.render import Renderer, template_for, token_texts
        from trainer.data.shape import Shaper

        found, rows = self._row(path, row, columns)
        shaper = Shaper(profile, profiles_root, system_prompt, date)
        view: dict[str, Any] = {
            "line": found.line, "rows": rows, "system_prompt": shaper.system_prompt, "before": found.messages,
            "after": None, "tokens": [], "counts": {}, "notes": [], "note": "", "problem": None,
        }  # fmt: skip
        if found.problem is not None:
            return view | {"problem": asdict(found.problem)}
        try:
            if found.text is not None:
                tokenizer = self._load_tokenizer(model_path)
                return view | _text_view(found, Path(path).name, tokenizer, profile, max_length, piece)
            view["after"] = shaper.shape(found.messages, found.index)
            tokenizer = self._load_tokenizer(model_path)
            template, template_note = template_for(tokenizer, shaper.profile, chat_template)
            rendered = Renderer(tokenizer, template, date).render(view["after"])
        except Refusal as refusal:
            if refusal.field is not None:
                raise
            return view | {"problem": {"code": "template", "message": refusal.message}}
        kinds = [kind if at < max_length else "cut" for at, kind in enumerate(rendered.kinds)]
        shown = rendered.ids[:TOKENS_SHOWN]
        tokens = [
            {"text": text, "id": number, "kind": kind}
            for text, number, kind in zip(token_texts(tokenizer, shown), shown, kinds, strict=False)
        ]
        counts = {kind: kinds.count(kind) for kind in ("label", "context", "special", "cut")}
        counts["tokens"] = len(kinds)
        note = _note(len(kinds), counts, max_length, too_long, template_note)
        return view | {"tokens": tokens, "counts": counts, "notes": list(rendered.notes), "note": note}

    def preview_profile(
        self,
        path: str,
        profile: str | None,
        system_prompt: str,
        date: str,
        profiles_root: str | None = None,
        rows: int = PREVIEW_ROWS,
        columns: Sequence[str] = (),
    ) -> dict[str, Any]:
        """The first usable rows before and after the profile, and the system prompt with the date filled in."""
        from trainer.data.formats import read_rows
        from trainer.data.shape import Shaper

        shaper = Shaper(profile, profiles_root, system_prompt, date)
        shown: list[dict[str, Any]] = []
        for row in read_rows(path, columns=columns):
            if len(shown) >= rows:
                break
            if row.messages is None:
                continue
            view = {"line": row.line, "row": row.index, "before": row.messages, "after": None, "problem": None}
            try:
                view["after"] = shaper.shape(row.messages, row.index)
            except Refusal as refusal:
                view["problem"] = refusal.message
            shown.append(view)
        return {
            "system_prompt": shaper.system_prompt,
            "description": shaper.profile.description if shaper.profile else "",
            "rows": shown,
        }

    def token_texts(self, model_path: str, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        """{"texts": what each id of each row adds to its text, "special": ids that are control tokens}."""
        from trainer.data.render import token_texts

        tokenizer = self._load_tokenizer(model_path)
        special = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
        return {"texts": [token_texts(tokenizer, row) for row in rows], "special": sorted(special)}

    def tokenise(self, request: dict[str, Any], root: str) -> dict[str, Any]:
        """Build or find the token cache of `request` (fields of TokenRequest) in `root`; reports rows done."""
        from trainer.data.tokens import TokenCache, TokenRequest, build_cache

        lists = {"files": tuple(request["files"]), "columns": tuple(request.get("columns", ()))}
        asked = TokenRequest(**(request | lists))
        cache = build_cache(asked, Path(root), self._progress)
        return {"cache": str(cache), "meta": TokenCache.open(cache).meta}

    def convert(self, path: str, out: str) -> dict[str, Any]:
        """Rewrite a folder with pickle weights as safetensors in the new folder `out`."""
        from trainer.models.convert import convert_model

        return convert_model(Path(path), Path(out)) | {"target": out}

    def starter(self, models_root: str, datasets_root: str) -> dict[str, str]:
        """Write the starter model and the starter dataset; {"model", "dataset"} are their paths."""
        from trainer.models.starter import write_starter

        model, dataset = write_starter(Path(models_root), Path(datasets_root))
        return {"model": str(model), "dataset": str(dataset)}

    def _progress(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done >= total or now - self._reported >= 0.1:
            self._reported = now
            self._report(done, total)

    def _load_tokenizer(self, model_path: str) -> Any:
        from trainer.data.tokens import load_tokenizer, tokenizer_files

        mark = (model_path, *((file.name, _stamp(file)) for file in tokenizer_files(Path(model_path))))
        if self._tokenizer[0] != mark:
            self._tokenizer = (mark, load_tokenizer(model_path))
        return self._tokenizer[1]

    def _row(self, path: str, index: int, columns: Sequence[str]) -> tuple[Any, int]:
        """(the row at `index`, rows in the file)."""
        from trainer.data.formats import read_rows, scan

        mark = (path, _stamp(Path(path)) if os.path.exists(path) else None)
        if self._rows[0] != mark:
            self._rows = (mark, scan(path).rows)
        rows = self._rows[1]
        found = next(read_rows(path, start=index, columns=columns), None) if index >= 0 else None
        if found is None:
            raise Refusal(f"There is no row {index + 1:,}: {Path(path).name} has {rows:,} rows.")
        return found, rows


def _text_view(
    row: Any, file: str, tokenizer: Any, profile: str | None, max_length: int, piece: int | None
) -> dict[str, Any]:
    """The changing part of a view of a plain text: its pieces end to end, or the one asked for."""
    from trainer.data.build import refuse_profile
    from trainer.data.plain_text import TextEncoder, pieces_of
    from trainer.data.render import own_template, token_texts

    refuse_profile(profile, file, row.line)
    # a preview of a whole library would take minutes; a piece is found only where all of it is encoded
    text = row.text if piece is not None else row.text[:CHARACTERS_VIEWED]
    pieces = pieces_of(TextEncoder(tokenizer, own_template(tokenizer)).document(text), max_length)
    if piece is not None and not 0 <= piece < len(pieces):
        raise Refusal(f"There is no piece {piece + 1:,}: the text has {len(pieces):,} pieces.")
    shown = pieces if piece is None else [pieces[piece]]
    ids = [number for each in shown for number in each]
    kinds = [kind for each in shown for kind in ["context", *["label"] * (len(each) - 1)]]
    ids_shown = ids[:TOKENS_SHOWN]
    tokens = [
        {"text": text, "id": number, "kind": kind}
        for text, number, kind in zip(token_texts(tokenizer, ids_shown), ids_shown, kinds, strict=False)
    ]
    said = "Plain text: every token is learned but the first"
    if len(shown) > 1:
        said += f" of each of its {len(shown):,} pieces, which have at most {max_length:,} tokens"
    note = f"{said}."
    if len(text) < len(row.text):
        note += f" These are its first {CHARACTERS_VIEWED:,} of {len(row.text):,} characters."
    if len(ids) > TOKENS_SHOWN:
        note += f" The first {TOKENS_SHOWN:,} tokens are shown."
    told = "".join(str(token["text"]) for token in tokens) if piece is not None else text[:CHARACTERS_SHOWN]
    turn = [{"role": "text", "content": told}]
    counts = {"label": len(ids) - len(shown), "context": len(shown), "special": 0, "cut": 0, "tokens": len(ids)}
    return {"before": turn, "after": turn, "tokens": tokens, "counts": counts, "note": note, "pieces": len(pieces)}


def _note(tokens: int, counts: dict[str, int], max_length: int, too_long: str, template_note: str) -> str:
    """What a person must know about a row's tokens, in sentences."""
    said = [template_note] if template_note else []
    if counts["cut"]:
        ends = {
            "cut": f"its last {counts['cut']:,} are cut off",
            "drop": "the row is left out",
            "refuse": "the run will not start",
        }
        said.append(f"{tokens:,} tokens, {max_length:,} allowed: {ends[too_long]}.")
    if tokens > TOKENS_SHOWN:
        said.append(f"The first {TOKENS_SHOWN:,} tokens are shown.")
    if not counts["label"]:
        said.append("No token of this row is trained.")
    return " ".join(said)


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
