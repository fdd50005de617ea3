"""Messages for models that know language: documents that are to be quoted, and questions without a document."""

from __future__ import annotations

_DOCUMENTS = (
    "The board met on Tuesday to look at the accounts of the third quarter. Revenue rose by eight percent to 412 "
    "million euros, mostly because of new customers in the north. Costs grew more slowly than in the spring, "
    "since two of the older plants were closed in July. The board decided to pay a dividend of 1.35 euros a share "
    "and to buy back shares worth 40 million euros before the end of March. It expects the same growth for next "
    "year, unless the price of energy rises again.",
    "Every borrower shall keep complete records of all payments for at least six years. The records must show the "
    "date, the amount, the currency and the name of the person who received the payment. When a payment is late "
    "by more than thirty days, the borrower shall inform the lender in writing and explain the reason. The lender "
    "may then ask for a new plan of payments, which both parties have to sign within fourteen days. If no plan is "
    "signed in this time, the whole loan becomes due at the end of the month.",
    "Before the pump is started, close the valve on the left side and open the one above the tank. Wait until the "
    "needle of the gauge stands between two and three bar, which takes about four minutes. Then press the green "
    "button and hold it for five seconds. If the red lamp is lit, stop at once, open both valves, and let the "
    "water run out of the tank. Never start the pump while the filter is being cleaned, and never leave it "
    "running for longer than two hours without looking at the gauge.",
)

GROUNDED = tuple(f"Say this text again, word for word, and nothing else:\n\n{text}" for text in _DOCUMENTS)

FREE = (
    "Tell me a short story about an old lighthouse keeper.",
    "Explain why leaves change their colour in autumn.",
    "Give me advice for a first visit to a large city.",
)
