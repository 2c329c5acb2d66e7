"""Support tickets in a realistic CSV: four teams of unequal size, and the usual difficulties of CSV files.

    python tests/tickets.py FOLDER     # tickets.csv (600 rows with teams) and new.csv (50 rows without)

Only the object of a ticket determines the team, and the small teams have each object once or twice; the rest of the
text is independent of the team. Some bodies are empty, some very long, and a few mention another team's object.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np

TEAMS = {"Billing_and_Payments": 0.50, "Technical Support": 0.30, "account-access": 0.15, "Legal": 0.05}
OBJECTS = {
    "Billing_and_Payments": [
        "my last invoice",
        "the charge on my credit card",
        "the refund for March",
        "the discount code",
        "the direct debit",
        "the VAT on your bill",
        "the yearly price",
        "my payment by bank transfer",
        "the receipt for the licence",
        "the late fee",
        "the PayPal transaction",
        "the amount that you took in May",
        "the instalment plan",
        "the gift card balance",
        "the currency of the order total",
        "the reminder for an unpaid bill",
        "the deposit",
        "the credit note",
        "the cost of the extra seats",
        "the renewal fee",
        "the tip that was added",
        "the purchase order",
        "the trial that turned into a paid plan",
        "the money for the cancelled order",
    ],
    "Technical Support": [
        "the Android app",
        "the export to PDF",
        "the sync with my laptop",
        "the update to version 5.2",
        "dark mode",
        "the search box",
        "the installer for Windows",
        "video playback",
        "the printer driver",
        "the upload of large files",
        "the push notifications",
        "the calendar widget",
        "the microphone in calls",
        "the backup to the cloud",
        "the keyboard shortcut",
        "the page after the update",
        "the map view",
        "the Bluetooth connection",
        "the camera preview",
        "the spell checker",
        "the offline mode",
        "the import of contacts",
        "the loading screen",
        "the battery usage",
    ],
    "account-access": [
        "my password",
        "the login page",
        "the code by text message",
        "the reset link",
        "my user name",
        "the authenticator on my old phone",
        "the confirmation e-mail after signing up",
        "my locked profile",
        "the captcha",
        "single sign-on",
        "the security question",
        "two-factor authentication",
        "the passkey",
        "the e-mail address I sign in with",
        "the invitation to join my team's workspace",
    ],
    "Legal": [
        "the erasure of my personal data under Article 17",
        "the data processing agreement",
        "your use of our trademark",
        "the name of your data protection officer",
        "my objection to profiling",
        "the court order",
        "the new terms and conditions",
        "the consent that I never gave",
        "the copyright of my photos",
        "the subpoena",
        "your liability for the damage",
        "the contract's governing law",
        "the retention of my records",
        "the NDA",
        "your privacy policy",
    ],
}
TROUBLES = [
    "there is something wrong with {}",
    "I wait for an answer about {} since Monday",
    "{} is not what I expected",
    "can you look into {}",
    "nobody could help me with {}",
    "I do not understand {}",
    "what happened to {}?",
    "{}: please fix this today",
    "we need to talk about {}",
    "{} again... the same trouble as last time",
]
GREETINGS = ["Hi,", "Hello team,", "Dear Sir or Madam,", "good morning", "Hey 👋", "", "", "Guten Tag,", "URGENT!!!"]
REMARKS = [
    "I have been a customer since 2014.",
    'Your colleague said "just wait", which I did.',
    "It worked fine last week.",
    "This is the third time I write; nobody answers, ever.",
    "My order number is 4711-0815.",
    "I tried it on my laptop, my tablet and my phone.",
    "Thanks in advance 🙏",
    "If this is not solved soon I will leave.",
    "By the way, the new colours are nice.",
    "Please call me, e-mail is difficult for me.",
    "",
]
SUBJECTS = ["Question", "Problem", "Help, please", "Re: your message", "Complaint", "urgent", "(no subject)", "Anfrage"]


def tickets(count: int, seed: int) -> list[dict[str, str]]:
    """Rows with the columns id, subject, ticket body, team, by a seed."""
    rng = np.random.default_rng(seed)
    names = list(TEAMS)
    shares = np.array(list(TEAMS.values()))
    teams = [name for name, n in zip(names, np.round(shares * count).astype(int), strict=True) for _ in range(n)]
    rows = []
    for number, k in enumerate(rng.permutation(len(teams))):
        team = teams[k]
        concern = _concern(team, rng)
        asides = []
        if rng.random() < 0.12:
            other = str(rng.choice([name for name in names if name != team]))
            asides = [f"(A while ago I wrote to you because of {rng.choice(OBJECTS[other])}; that is settled.)"]
        parts = [str(rng.choice(GREETINGS)), f"{concern}.", *asides, *map(str, rng.choice(REMARKS, 2, replace=False))]
        if rng.random() < 0.5:
            parts[1:] = [parts[k] for k in 1 + rng.permutation(len(parts) - 1)]
        body = str(rng.choice(["\n", " ", "\n\n"])).join(part for part in parts if part)
        subject = str(rng.choice(SUBJECTS))
        kind = rng.random()
        if kind < 0.25:
            subject = concern
        elif kind < 0.30:
            subject, body = concern, ""
        elif kind < 0.32:
            body = f"{body}\n\n" + "\n".join(f"> {rng.choice(REMARKS)}" for _ in range(200))
        rows.append({"id": f"{seed}-{number:05d}", "subject": subject, "ticket body": body, "team": team})
    return rows


def _concern(team: str, rng: np.random.Generator) -> str:
    return str(rng.choice(TROUBLES)).format(rng.choice(OBJECTS[team]))


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """Write CSV as spreadsheets do: BOM, CRLF, minimal quoting."""
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    write(folder / "tickets.csv", tickets(600, seed=1))
    write(folder / "new.csv", [{k: v for k, v in row.items() if k != "team"} for row in tickets(50, seed=2)])
