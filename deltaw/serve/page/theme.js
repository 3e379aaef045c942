// Light or dark: as the reader chose it, which is remembered, or else as the system has it.

const NAME = "deltaw-theme";
const systemDark = matchMedia("(prefers-color-scheme: dark)");
let choice = null;
try {
  choice = localStorage.getItem(NAME);
} catch { /* storage is forbidden: a choice holds as long as the page is open */ }

export function switchTheme(button) {
  const show = () => {
    if (choice) document.documentElement.dataset.theme = choice;
    button.setAttribute("aria-pressed", choice ? choice === "dark" : systemDark.matches);
  };
  button.addEventListener("click", () => {
    choice = button.getAttribute("aria-pressed") === "true" ? "light" : "dark";
    try {
      localStorage.setItem(NAME, choice);
    } catch { /* as above */ }
    show();
  });
  systemDark.addEventListener("change", show);
  show();
}
