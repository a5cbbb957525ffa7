// Sets every formula that Markdown has marked: \(...\) within a line, \[...\] on its own.
document.addEventListener("DOMContentLoaded", () => {
  for (const element of document.querySelectorAll(".arithmatex")) {
    const formula = element.textContent.trim().slice(2, -2);
    katex.render(formula, element, { displayMode: element.tagName === "DIV", throwOnError: false });
  }
});
