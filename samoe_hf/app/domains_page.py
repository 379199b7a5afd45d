"""The page's fourth part: the domains of a model are seen, changed, taken from others, and saved.

Others may track with the same model. So a change makes a copy for whoever asked for it, and a video that is open goes
on with what it has.
"""

from collections.abc import Callable
from pathlib import Path

import gradio as gr
from huggingface_hub.utils import validate_repo_id
from transformers.utils import CONFIG_NAME

from samoe_hf.continual import manage_domains
from samoe_hf.errors import InputError, input_errors
from samoe_hf.surgery.domains import remove_domain, rename_domain

from .models import DEVICE_LOCK, LoadedModel, taking_turns
from .page_parts import App, Part, Shown, button, one_of, picture, shown_picture
from .people import Person
from .uploads import safe_name

CLOSED = (
    "Domains of others are added, and changed models saved, where the app has a place for models: "
    "`samoe app MODEL --models DIR`."
)
CHANGED = "**Changed for you alone, and not saved.** Your next video gets the changed model"
OPEN = "; the one that is open keeps what it has until *Start anew with these* in *Look inside*"
LABEL = "Domains, and how many videos the gate knows each by"
EMPTY = "It has no domains: all its videos get the same experts."


class DomainsPart(Part):
    """List, map, rename, remove, confirm; add and save where there is a place for models."""

    def __init__(self, app: App, key: gr.State):
        super().__init__(app, key)
        self.model = gr.Dropdown(list(app.models), value=app.first.name, label="Model", elem_id="domains-model")
        self.note = gr.Markdown("", elem_id="domains-note")
        self.table = gr.Dataframe(label=LABEL, interactive=False, elem_id="domains-table")
        self.map = picture("How near domains are to each other for the gate", "domains-map", visible=False)
        with gr.Column(visible=False) as self.changes:
            with gr.Row():
                self.domain = gr.Dropdown([], label="Domain", elem_id="domains-domain", interactive=True)
                new_name = gr.Textbox("", label="New name", elem_id="domains-new-name", max_lines=1)
            with gr.Row():
                confirm = button("The video in Track is of this domain", "domains-confirm", scale=2)
                rename = button("Rename", "domains-rename")
                remove = button("Remove", "domains-remove", "stop")
        gr.Markdown(CLOSED, visible=app.store is None)
        with gr.Column(visible=app.store is not None):
            with gr.Row():
                label = "Add domains of a model here, or of OWNER/NAME on the Hub"
                self.other = gr.Dropdown(
                    [], label=label, elem_id="domains-other", allow_custom_value=True, interactive=True, scale=2
                )
                only = gr.Textbox("", label="Only this domain", elem_id="domains-only", max_lines=1)
                called = gr.Textbox("", label="Under another name", elem_id="domains-called", max_lines=1)
            with gr.Row():
                add = button("Add", "domains-add", scale=2)
                find = button("Find some on the Hub", "domains-find")
            with gr.Row(elem_classes="middle"):
                name = gr.Textbox("", label="Save the changed model as", elem_id="domains-name", max_lines=1, scale=2)
                self.keep = button("Save", "domains-save", "primary", interactive=False)
        self.back = button("Take my changes back", "domains-back", interactive=False)
        shown = {self.model, self.note, self.table, self.map, self.changes, self.domain, self.other}
        self.shown = shown | {self.keep, self.back}

        one, shown = [self.model, self.domain], self.shown
        self.on(self.model.input, self.view, [self.model], shown)
        self.on_device(confirm.click, self.confirm, one, shown, self.note)
        self.on(rename.click, self.rename, [*one, new_name], shown)
        self.on(remove.click, self.remove, one, shown)
        self.on(add.click, self.add, [self.model, self.other, only, called], shown, concurrency_limit=1)
        self.on(find.click, self.find, [self.model], {self.other, self.note})
        self.on(self.keep.click, self.save, [self.model, name], shown, concurrency_limit=1)
        self.on(self.back.click, self.take_back, [self.model], shown)

    def view(self, person: Person, name: object = None, said: str = "", domain: object = None) -> Shown:
        """A model was chosen, or the part is opened; `said` of what was done, with a `domain` that stays chosen."""
        models, session = self.app.models_of(person), person.session
        known = name if isinstance(name, str) and name in models else session.loaded.name if session else None
        loaded = models[known or self.app.first.name]
        rows = manage_domains.list_domains(loaded.model)
        chosen = [one for one in loaded.domains if one == domain] or loaded.domains or [None]
        is_known = any(row[-1] for row in rows)  # a domain, by the gate
        words = [said, "" if rows else EMPTY]
        if loaded.is_changed:
            is_older = session is not None and session.loaded.name == loaded.name and session.loaded is not loaded
            words.append(f"{CHANGED}{OPEN if is_older else ''}.")
        others = [*(one for one in models if one != loaded.name), *self._folders()]
        return {
            self.model: gr.Dropdown(list(models), value=loaded.name),
            self.note: " ".join(filter(None, words)),
            self.table: gr.Dataframe(rows, headers=[*manage_domains.HEADINGS[:-1], "videos"], visible=bool(rows)),
            self.map: shown_picture(manage_domains.draw_map(loaded.model, loaded.example) if is_known else None),
            self.changes: gr.Column(visible=bool(rows)),
            self.domain: gr.Dropdown(loaded.domains, value=chosen[0]),
            self.other: gr.Dropdown(others, value=None),
            self.keep: gr.Button(interactive=loaded.is_changed),
            self.back: gr.Button(interactive=loaded.is_changed),
        }

    def _model(self, person: Person, name: object) -> LoadedModel:
        models = self.app.models_of(person)
        return models[one_of(name, models, "model")]

    def _folders(self) -> list[str]:
        """Models in the app's place for them."""
        store = self.app.store
        return [] if store is None else sorted(path.parent.name for path in store.glob(f"[!.]*/{CONFIG_NAME}"))

    # --- Changes

    def _change(self, person: Person, name: object, change: Callable[[LoadedModel], tuple[str, str]]) -> Shown:
        """Changes a copy of a model, for the person; `change` says what was done, and to which domain."""
        loaded = self._model(person, name)
        with DEVICE_LOCK:
            changed = loaded.copied()
        said, domain = change(changed)
        if self._model(person, name) is not loaded:
            raise InputError("Another change of yours came first. Do this one again.")
        person.changed[loaded.name] = changed
        return self.view(person, loaded.name, said, domain)

    def rename(self, person: Person, name: object, domain: object, new_name: object) -> Shown:
        """A domain gets another name."""

        def change(changed: LoadedModel) -> tuple[str, str]:
            old, new = one_of(domain, changed.domains, "domain"), _typed(new_name)
            rename_domain(changed.model, old, new)
            changed.origins[new] = changed.origin(old)
            return f"{old} is now {new}.", new

        return self._change(person, name, change)

    def remove(self, person: Person, name: object, domain: object) -> Shown:
        """A domain is not wanted any more."""

        def change(changed: LoadedModel) -> tuple[str, str]:
            known = one_of(domain, changed.domains, "domain")
            remove_domain(changed.model, known)
            return f"Removed {known}.", known

        return self._change(person, name, change)

    def confirm(self, person: Person, name: object, domain: object) -> Shown:
        """The video that is open is of a domain."""
        video = person.the_session().video

        def change(changed: LoadedModel) -> tuple[str, str]:
            known, frames = one_of(domain, changed.domains, "domain"), video.frames_again()
            said = manage_domains.confirm(changed.model, changed.processor, frames, known, taking_turns)
            return f"{video.name}: {said}", known

        return self._change(person, name, change)

    def take_back(self, person: Person, name: object) -> Shown:
        """The model is wanted as it was loaded."""
        person.changed.pop(self._model(person, name).name, None)
        return self.view(person, name, "As it was loaded.")

    # --- Domains of others, and the place for models

    def add(self, person: Person, name: object, other: object, only: object, called: object) -> Shown:
        """Domains of another model are wanted."""
        names = [one] if (one := _typed(only)) else []
        whose = self._load(person, _typed(other), names, self._model(person, name))

        def change(changed: LoadedModel) -> tuple[str, str]:
            taken = manage_domains.take_domains(changed.model, whose.model, names, _typed(called) or None)
            changed.origins.update({new: whose.origin(old) for new, old in taken.items()})
            return f"Added {', '.join(taken)}, of {whose.name}.", next(iter(taken), "")

        return self._change(person, name, change)

    def _load(self, person: Person, other: str, names: list[str], like: LoadedModel) -> LoadedModel:
        """A copy of another model: of one here, of one in the place for models, or of the Hub, and of no other path."""
        models, store = self.app.models_of(person), self._store
        if other in models:
            with DEVICE_LOCK:
                return models[other].copied()
        source = str(store / other) if other in self._folders() else other
        if source == other and ("/" not in other or Path(other).exists()):
            known = ", ".join([*models, *self._folders()])
            raise InputError(f"Domains are added of a model here ({known}) or of OWNER/NAME on the Hub, got {other!r}.")
        with input_errors(other):
            validate_repo_id(source) if source == other else None
            model = manage_domains.load_for_domains(source, names, like.model)
        return LoadedModel(other, source, model, like.processor)

    @property
    def _store(self) -> Path:
        """The app's place for models; InputError where it has none."""
        if self.app.store is None:
            raise InputError(CLOSED)
        return self.app.store

    def find(self, person: Person, name: object) -> Shown:
        """Others' domains on the same base are looked for on the Hub."""
        loaded = self._model(person, name)
        assert self._store
        base, found = manage_domains.find_on_hub(loaded.model, loaded.source)
        choices = [(f"{one}: {', '.join(names) or 'cannot be read'}", one) for one, names in found.items()]
        nothing = manage_domains.NOTHING_FOUND.format(base)
        said = f"Found {len(found)} on {base}; choose one." if found else nothing
        return {self.other: gr.Dropdown(choices, value=None), self.note: said}

    def save(self, person: Person, name: object, folder: object) -> Shown:
        """The changed model is written beside the others in the place for models, and is there for everybody."""
        loaded, called = self._model(person, name), _typed(folder)
        target = self._store / called
        if not called or safe_name(called) != called:
            raise InputError(f"The name must be of letters, digits, _ and -, at most 60, got {called!r}.")
        if not loaded.is_changed or target.exists():
            raise InputError(
                f"{called} is there; choose another name." if loaded.is_changed else "Nothing was changed."
            )
        examples = {one: path for one in loaded.domains if (path := loaded.example(one)) is not None}
        manage_domains.save_as_it_came(loaded.model, loaded.processor, loaded.source, target, examples)
        saved = self.app.add(LoadedModel(called, str(target), loaded.model, loaded.processor))
        if person.changed.get(loaded.name) is loaded:
            del person.changed[loaded.name]
        return self.view(person, saved.name, f"Saved, as it runs here ({loaded.model.dtype}), as {saved.name}.")


def _typed(value: object) -> str:
    """What was typed or chosen, at most so much of it."""
    return str(value or "").strip()[:100]
