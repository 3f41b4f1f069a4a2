// Browsers start no worker for a page that is opened from a folder. Then the script of the search runs in a hidden
// frame instead. The plugin `offline` knows such a script by its name.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(script) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.title = "Search";
      // What the script posts arrives at the element of the frame
      frame.srcdoc =
        "<script>postMessage = (data) => frameElement.dispatchEvent(new MessageEvent('message', { data }))</script>" +
        `<script src="${script}"></script>`;
      frame.addEventListener("message", ({ data }) => this.dispatchEvent(new MessageEvent("message", { data })));
      this.loaded = new Promise((resolve) => frame.addEventListener("load", () => resolve(frame.contentWindow)));
      document.body.append(frame);
    }

    async postMessage(data) {
      (await this.loaded).dispatchEvent(new MessageEvent("message", { data }));
    }
  };
}
