"""Which questions the samples of a run ask, for each form of document."""

from __future__ import annotations

from pile_app.documents import IMAGE, TEXT, Document, Segment
from pile_app.training.callbacks import questions


def test_each_form_of_document_asks_what_the_model_learns_from_it() -> None:
    picture, name, question = Segment(b"x", "png"), Segment("zero"), Segment("what?", loss=False)
    asked = {
        (name,): [(("ze",), TEXT)],
        (picture,): [((), IMAGE)],
        (picture, question, name): [((b"x", "what?"), TEXT)],
        (question, name): [(("what?",), TEXT)],
    }
    for segments, expected in asked.items():
        found = [(tuple(s.data for s in prompt.segments), to) for prompt, to, _ in questions(Document(segments))]
        assert found == expected
    both = [(prompt.segments[0], to) for prompt, to, _ in questions(Document((picture, name), ordered=False))]
    assert both == [(name, IMAGE), (picture, TEXT)]
